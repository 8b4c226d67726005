"""The papers' questions: theory, when to grow, what it costs, the experiments at a small size."""
