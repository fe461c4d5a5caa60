"""Stage 1: source domains are given to experts, and each expert is trained on its own group alone."""
