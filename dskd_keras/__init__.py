"""Deeply-supervised knowledge distillation for Keras 3."""
