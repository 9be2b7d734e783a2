"""transformers' Llama in the shape of a generator, drawing codes with guidance: what samplers are measured beside."""

import inspect

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from generator.code_space import CodeSpace
from generator.config import GeneratorConfig


def llama_of(config: GeneratorConfig, space: CodeSpace) -> LlamaForCausalLM:
    """In evaluation mode; it has no classes of its own: the first token is one of the codes."""
    shape = LlamaConfig(
        vocab_size=space.codebook_size,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.ffn_width,
        max_position_embeddings=space.num_tokens,
    )
    return LlamaForCausalLM(shape).eval()


@torch.inference_mode()
def llama_tokens(llama: LlamaForCausalLM, class_B: Tensor, steps: int, scale: float) -> Tensor:
    """The first `steps` codes (B, steps), drawn as samplers on top of transformers do."""
    cache = StaticCache(config=llama.config, max_cache_len=llama.config.max_position_embeddings)
    # Earlier versions call it `past_key_values`; a name that it does not know would be ignored.
    name = "cache" if "cache" in inspect.signature(llama.forward).parameters else "past_key_values"
    tokens_R = torch.cat([class_B, torch.zeros_like(class_B)])
    codes = []
    for position in range(steps):
        place = torch.tensor([position], device=class_B.device)
        out = llama(input_ids=tokens_R[:, None], cache_position=place, **{name: cache})
        cond_BV, uncond_BV = out.logits[:, -1].float().chunk(2)
        probability_BV = (uncond_BV + scale * (cond_BV - uncond_BV)).softmax(-1)
        codes.append(torch.multinomial(probability_BV, 1)[:, 0])
        tokens_R = codes[-1].repeat(2)
    return torch.stack(codes, dim=1)
