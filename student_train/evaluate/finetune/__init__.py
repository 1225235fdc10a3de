"""`kdeval finetune`: a student, fine-tuned on tasks."""
