"""What is read out of a Hugging Face model, teacher or student alike: attention taps, heads, facts of a family."""
