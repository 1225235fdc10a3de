"""`kdeval finetune`: a student, fine-tuned on tasks with several seeds.

Begin with `finetune.py` (settings become a report), then `tasks.py` (the table of tasks). Examples come through
`task_files.py` (files become records), `examples.py` (records become texts and labels), `data.py` (the sets of one
fine-tuning) and `inputs.py` (texts become token ids); `model.py`, `hf_trainer.py`, `predictions.py` and `metrics.py`
train and measure, `save.py` keeps the model; `records.py` holds the report, its table and the results that are kept,
`settings.py` the flags, of which `own_task.py` makes a task of the user's own.
Doors: `measure_finetune`, `FinetuneReport`, `FinetuneSettings`.
Knows no cache and no teacher: any Hugging Face encoder will do.
"""
