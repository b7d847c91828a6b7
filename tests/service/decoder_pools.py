"""Pools of decoders for the tests: one process, bounds that no test meets by accident."""

from service.decode import DecoderPool
from trainer.representation.preprocess import InputContract

CONTRACT = InputContract(size_px=8, crop_fraction=0.875)
WAIT_S = 30


def make_pool(contract: InputContract = CONTRACT, **options: object) -> DecoderPool:
    defaults: dict[str, object] = {
        "size": 1,
        "timeout_s": 20.0,
        "memory_bytes": 2**30,
        "lifetime_images": 500,
        "max_pixels": 1_000_000,
        "max_image_bytes": 2**24,
        "max_large_waiting": 4,
    }
    return DecoderPool(contract, **(defaults | options))  # type: ignore[arg-type]
