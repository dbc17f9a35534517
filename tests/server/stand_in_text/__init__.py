"""A node for the place of text encoders, of which none is tiny: random conditioning of any width."""

import torch


class StandInText:
    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"width": ("INT",), "pooled": ("INT",), "seed": ("INT",), "masked": ("BOOLEAN",)}}
    )
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "test"

    def make(self, width, pooled, seed, masked):
        generator = torch.Generator().manual_seed(seed)
        extra = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
        if masked:  # as the encoder of LTX-Video gives it out
            extra["attention_mask"] = torch.ones(1, 10, dtype=torch.long)
        return ([[torch.randn(1, 10, width, generator=generator), extra]],)


NODE_CLASS_MAPPINGS = {"StandInText": StandInText}
