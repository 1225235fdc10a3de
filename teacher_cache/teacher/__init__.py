"""The frozen model behind one seam: rows go in, outputs for every kind of target come out.

Begin with `teacher.py`; `outputs.py` is all that others see of a pass. `loading.py` refuses by name what cannot
teach, `gguf.py` is about teachers that lie in a file of llama.cpp, `placing.py` about those larger than one device.
Doors: `Teacher`, `TeacherOutputs`. They import torch and Transformers.
Knows nothing of text, codecs or stores, and trains nothing.
"""
