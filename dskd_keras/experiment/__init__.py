"""The runner: from a configuration to a trained student and its report."""
