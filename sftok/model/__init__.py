"""The SFTok model and its teacher as `torch.nn` modules, and both prepared for inference.

`tokenizer.SFTok` is the tokenizer, `teacher.Teacher` the MaskGIT-VQGAN, `iterative_decoding` the loop over decoding
steps. `prepared` prepares them for inference: on any device by `cast_transformer` and `cast_head`, on CPUs by `cpu`,
images by `prepared_pixels`.
"""
