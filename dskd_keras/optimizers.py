"""Stochastic gradient descent as PyTorch computes it, which the published protocols assume."""

import itertools
import math
from numbers import Real

import keras
from keras import ops

from dskd_keras.errors import InputError


@keras.saving.register_keras_serializable("dskd_keras")
class SGD(keras.optimizers.Optimizer):
    """Gradient descent with momentum and coupled weight decay: the update of `torch.optim.SGD`.

    For a weight `w` with gradient `g` and momentum buffer `v`, which starts at zero:

    ```
    g = g + weight_decay * w
    v = momentum * v + g
    d = g + momentum * v if nesterov else v
    w = w - learning_rate * d
    ```

    `keras.optimizers.SGD` differs in two ways that change published recipes:

    - Its weight decay is decoupled: it shrinks the weight beside the gradient and escapes the
      momentum, which multiplies PyTorch's by 1 / (1 - momentum). After 400 steps without gradient
      at learning rate 0.05, momentum 0.9 and weight decay 5e-4, PyTorch leaves 0.907 of a weight
      and Keras 0.990.
    - It folds the learning rate into the velocity, so that after a drop of the learning rate the
      old, larger steps go on for a while. Here, as in PyTorch, the drop acts at once.

    Gradients are clipped, accumulated and unscaled before the decay is added, so `global_clipnorm`
    is `torch.nn.utils.clip_grad_norm_` before the step.

    Args:
        learning_rate: A float, a `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            without arguments. Defaults to 0.1.
        momentum: A float in [0, 1). Defaults to 0.0.
        nesterov: Whether to take Nesterov's step; needs a momentum. Defaults to `False`.
        weight_decay: A float of at least 0, added to the gradient as `weight_decay * w`.
            `exclude_from_weight_decay`, called before training, exempts variables, and as with
            Keras's optimizers it isn't part of the configuration. The attribute is
            `coupled_weight_decay`: the base class applies one named `weight_decay` by itself, so
            that stays `None`. Defaults to 0.0.
        **kwargs: Other arguments of `keras.optimizers.Optimizer`, such as `global_clipnorm`,
            `gradient_accumulation_steps`, `use_ema` and `name`.

    Raises:
        InputError: A number is out of its range, or `nesterov` is set without a momentum.
    """

    def __init__(
        self,
        learning_rate=0.1,
        momentum=0.0,
        nesterov=False,
        weight_decay=0.0,
        **kwargs,
    ):
        if not callable(learning_rate):
            if not _is_number(learning_rate) or not 0 <= learning_rate < math.inf:
                raise InputError(
                    f"learning_rate: {learning_rate!r} is not a number of at least 0, "
                    "a LearningRateSchedule or a callable."
                )
            learning_rate = float(learning_rate)
        if not _is_number(momentum) or not 0 <= momentum < 1:
            raise InputError(f"momentum: {momentum!r} is not a number in [0, 1).")
        if nesterov and momentum == 0:
            raise InputError(f"nesterov: {nesterov!r} needs a momentum above 0.")
        if not _is_number(weight_decay) or not 0 <= weight_decay < math.inf:
            raise InputError(f"weight_decay: {weight_decay!r} is not a number of at least 0.")
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.momentum = float(momentum)
        self.nesterov = bool(nesterov)
        self.coupled_weight_decay = float(weight_decay)

    def build(self, variables):
        """Creates one momentum buffer a variable, where there is a momentum.

        Args:
            variables: The trainable variables of the model.
        """
        if self.built:
            return
        super().build(variables)
        self.momentums = []
        if self.momentum:
            self.momentums = self.add_optimizer_variables(variables, "momentum")

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        """Exempts variables from the weight decay.

        Args:
            var_list: The variables.
            var_names: Patterns (regular expressions); a variable is exempt where one of them is
                found in its name. `["bias", "gamma", "beta"]` leaves the kernels alone.

        Raises:
            InputError: The optimizer is built; a compiled step would not notice the change.
        """
        if self.built:
            raise InputError(
                "exclude_from_weight_decay: call it before the optimizer is built, that is before "
                f"training; {self.name!r} has been built."
            )
        super().exclude_from_weight_decay(var_list, var_names)

    def update_step(self, gradient, variable, learning_rate):
        """Takes one step on one variable.

        Args:
            gradient: Gradient of the loss, in the shape of the variable.
            variable: The variable; it is changed in place.
            learning_rate: Scalar.
        """
        # Tensors with their own operators: calls into `keras.ops` take twice as long on PyTorch.
        value = ops.convert_to_tensor(variable)
        learning_rate = ops.cast(learning_rate, variable.dtype)
        step = ops.convert_to_tensor(gradient, dtype=variable.dtype)
        if self.coupled_weight_decay and self._use_weight_decay(variable):
            step = step + self.coupled_weight_decay * value
        if self.momentum:
            momentum = self.momentums[self._get_variable_index(variable)]
            buffer = self.momentum * ops.convert_to_tensor(momentum) + step
            self.assign(momentum, buffer)
            step = step + self.momentum * buffer if self.nesterov else buffer
        self.assign(variable, value - learning_rate * step)

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        # Keras's hook for a backend that can update all variables at once. Where it isn't called,
        # `update_step` does the same, one variable after the other.
        if keras.backend.backend() != "torch":
            super()._backend_update_step(grads, trainable_variables, learning_rate)
            return
        import torch

        with torch.no_grad():
            self._update_all(list(grads), trainable_variables, learning_rate)

    def _update_all(self, steps, variables, learning_rate):
        import torch

        values = [variable.value for variable in variables]
        decayed = [self._use_weight_decay(variable) for variable in variables]
        if self.coupled_weight_decay and any(decayed):
            of_decayed = iter(
                torch._foreach_add(
                    list(itertools.compress(steps, decayed)),
                    list(itertools.compress(values, decayed)),
                    alpha=self.coupled_weight_decay,
                )
            )
            steps = [next(of_decayed) if d else s for s, d in zip(steps, decayed, strict=True)]
        if self.momentum:
            buffers = [self.momentums[self._get_variable_index(v)].value for v in variables]
            torch._foreach_mul_(buffers, self.momentum)
            torch._foreach_add_(buffers, steps)
            steps = (
                torch._foreach_add(steps, buffers, alpha=self.momentum)
                if self.nesterov
                else buffers
            )
        # As a tensor the rate stays on its device; the copies keep the momentum as it is.
        torch._foreach_sub_(values, torch._foreach_mul(steps, learning_rate))

    def get_config(self):
        """Returns the arguments of the constructor as a serializable dictionary."""
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "weight_decay": self.coupled_weight_decay,
        }


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
