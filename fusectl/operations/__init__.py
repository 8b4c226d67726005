"""One module for each verb that makes a checkpoint: sources and Options become a Plan."""
