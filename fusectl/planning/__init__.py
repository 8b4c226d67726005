"""What will be written, before any byte is: the Plan (plan.py), and the Builder that makes it, who lists the others."""
