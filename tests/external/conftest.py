"""Scripts for other environments are not collected, not for doctests either."""

collect_ignore = ["gemma_logits.py", "t5x_run.py"]
