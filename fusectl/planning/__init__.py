"""What will be written, before any byte is. plan.py has the Plan, builder.py makes it and says what the others are for."""
