"""Stochastic gradient descent as PyTorch computes it, which the published protocols assume."""

from collections.abc import Iterable
from typing import Any

import keras
from keras import ops

from dskd_keras import checks
from dskd_keras.errors import InputError
from dskd_keras.keras_internals import decays, variable_index


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

    - Its weight decay is decoupled: it shrinks the weight directly, past the momentum. PyTorch's
      goes through the momentum, which multiplies it by 1 / (1 - momentum). After 400 steps without
      gradient at learning rate 0.05, momentum 0.9 and weight decay 5e-4, PyTorch leaves 0.907 of a
      weight and Keras 0.990.
    - Its velocity holds the learning rate, so that after a drop of the learning rate the old,
      larger steps go on for a while. Here, as in PyTorch, the drop acts at once.

    Gradients are clipped, accumulated and unscaled before the decay is added, so `global_clipnorm`
    is `torch.nn.utils.clip_grad_norm_` before the step.

    Args:
        learning_rate: A number of at least 0, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a callable without arguments.
            Defaults to 0.1.
        momentum: A number of at least 0 and below 1. Defaults to 0.0.
        nesterov: Whether to take Nesterov's step, which needs a momentum. Defaults to False.
        weight_decay: A number of at least 0. Defaults to 0.0.
        **kwargs: Other arguments of `keras.optimizers.Optimizer`, such as `global_clipnorm`,
            `gradient_accumulation_steps`, `use_ema` and `name`.

    Attributes:
        coupled_weight_decay: `weight_decay`. The attribute `weight_decay` stays None: Keras would
            apply it, decoupled, beside this one.

    Raises:
        InputError: A number is out of its range, or `nesterov` is set without a momentum.
    """

    def __init__(
        self,
        learning_rate: Any = 0.1,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if not callable(learning_rate):
            learning_rate = checks.real("learning_rate", learning_rate, least=0)
        momentum = checks.real("momentum", momentum, least=0, below=1)
        if nesterov and not momentum:
            raise InputError("nesterov: True, but momentum is 0. Give a momentum above 0.")
        weight_decay = checks.real("weight_decay", weight_decay, least=0)
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.momentum = momentum
        self.nesterov = bool(nesterov)
        self.coupled_weight_decay = weight_decay

    def build(self, variables: list[keras.Variable]) -> None:
        """Creates one momentum buffer a trainable variable, where there is a momentum."""
        if self.built:
            return
        super().build(variables)
        self.momentums = []
        if self.momentum:
            self.momentums = self.add_optimizer_variables(variables, "momentum")

    def exclude_from_weight_decay(
        self,
        var_list: Iterable[keras.Variable] | None = None,
        var_names: Iterable[str] | None = None,
    ) -> None:
        """Exempts variables from the weight decay.

        As with Keras's optimizers, this is not part of the configuration.

        Args:
            var_list: The variables.
            var_names: Patterns (regular expressions); a variable is exempt where one of them is
                found in its name. `["bias", "gamma", "beta"]` leaves the kernels alone.

        Raises:
            InputError: The optimizer is built. A compiled step would not notice the change.
        """
        if self.built:
            raise InputError(
                "exclude_from_weight_decay: call it before the optimizer is built, that is before "
                f"training; {self.name!r} has been built."
            )
        super().exclude_from_weight_decay(var_list, var_names)

    def update_step(self, gradient: Any, variable: keras.Variable, learning_rate: Any) -> None:
        """Takes one step on one variable, whose shape the gradient has; changes it in place."""
        # Tensors with their own operators: calls into `keras.ops` take twice as long on PyTorch.
        value = ops.convert_to_tensor(variable)
        learning_rate = ops.cast(learning_rate, variable.dtype)
        step = ops.convert_to_tensor(gradient, dtype=variable.dtype)
        if self.coupled_weight_decay and decays(self, variable):
            step = step + self.coupled_weight_decay * value
        if self.momentum:
            momentum = self.momentums[variable_index(self, variable)]
            buffer = self.momentum * ops.convert_to_tensor(momentum) + step
            self.assign(momentum, buffer)
            step = step + self.momentum * buffer if self.nesterov else buffer
        self.assign(variable, value - learning_rate * step)

    def _backend_update_step(
        self, grads: Iterable[Any], trainable_variables: list[keras.Variable], learning_rate: Any
    ) -> None:
        # A hook of Keras's: see keras_internals.HOOKS.
        if keras.backend.backend() == "torch":
            import torch

            with torch.no_grad():
                self._update_all(list(grads), trainable_variables, learning_rate)
        else:
            super()._backend_update_step(grads, trainable_variables, learning_rate)

    def _update_all(
        self, steps: list[Any], variables: list[keras.Variable], learning_rate: Any
    ) -> None:
        """Does what `update_step` does, for all variables at once, on PyTorch."""
        import torch

        values = [variable.value for variable in variables]
        decayed = [i for i, variable in enumerate(variables) if decays(self, variable)]
        if self.coupled_weight_decay and decayed:
            with_decay = torch._foreach_add(
                [steps[i] for i in decayed],
                [values[i] for i in decayed],
                alpha=self.coupled_weight_decay,
            )
            for i, step in zip(decayed, with_decay, strict=True):
                steps[i] = step
        if self.momentum:
            buffers = [self.momentums[variable_index(self, v)].value for v in variables]
            torch._foreach_mul_(buffers, self.momentum)
            torch._foreach_add_(buffers, steps)
            if self.nesterov:
                buffers = torch._foreach_add(steps, buffers, alpha=self.momentum)
            steps = buffers
        # The rate is a tensor and stays on its device. `steps` may be the momentum buffers: the
        # product is a copy.
        torch._foreach_sub_(values, torch._foreach_mul(steps, learning_rate))

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor as a serializable dictionary."""
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "weight_decay": self.coupled_weight_decay,
        }
