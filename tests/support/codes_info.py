"""What the codes of a test mean."""

from infra.codes.contract import CodesInfo


def codes_info(codebook_size: int, num_tokens: int, **others: object) -> CodesInfo:
    """Codes in two classes, unless `others` say something else."""
    usual = {"tokenizer": "t", "image_size": 8, "assignment": "nearest", "precision": "fp32", "class_names": ("a", "b")}
    sizes = {"codebook_size": codebook_size, "num_tokens": num_tokens}
    return CodesInfo.model_validate({**usual, **sizes, **others})
