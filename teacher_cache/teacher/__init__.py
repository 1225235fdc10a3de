"""The frozen model behind one seam: rows go in, outputs for every kind of target come out.

Begin with `teacher.py`; `outputs.py` is all that others see of a pass. `loading.py` refuses by name what cannot
teach, `gguf.py` is about teachers that lie in a file of llama.cpp, `shared.py` about those that several processes hold
together, which `processes.py` keeps in step.
Doors: `Teacher`, `TeacherOutputs`. They import torch and Transformers.
Knows nothing of text, codecs or stores, and trains nothing.
"""
