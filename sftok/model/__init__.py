"""The SFTok model and its teacher, as `torch.nn` modules, and what prepares them for inference.

`tokenizer.SFTok` is the tokenizer, `teacher.Teacher` the MaskGIT-VQGAN, `prepared` holds both for inference.
"""
