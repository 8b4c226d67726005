"""Looking at checkpoints: what one is, what two differ in, what is damaged, what a kernel looks like."""
