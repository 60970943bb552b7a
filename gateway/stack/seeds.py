"""Seeded requests on vLLM's CPU backend, made safe for prompts that take more than one step.

A step that computes only part of a prompt samples a token like any other, and vLLM 0.32 takes that draw back by the
offset of the request's generator (`GPUModelRunner._bookkeeping_sync`). Generators of the CPU have no offset: EngineCore
ends with "CPU Generator does not use offset", for all clients, because one has sent a `seed` with a long prompt.
"""

from typing import Any

import torch
from vllm.v1.worker.gpu_input_batch import InputBatch


class RewindableGenerator(torch.Generator):  # type: ignore[misc]
    """A generator of the CPU that takes draws back by beginning again at its seed.

    That is exact for a new request: nothing of a reply is drawn before the prompt is computed. A reply that was
    preempted and is continued draws its next tokens like its first ones.
    """

    def get_offset(self) -> int:
        """There is none; vLLM only subtracts from it."""
        return 0

    def set_offset(self, offset: int) -> None:
        """Take back whatever was drawn."""
        self.manual_seed(self.initial_seed())


def make_safe() -> None:
    """Give every seeded request that is added to a batch a generator that can be rewound."""
    register: Any = InputBatch._register_add_request  # `add_request` reads the generator afterwards

    def register_rewindable(batch: Any, request: Any) -> Any:
        seeded = request.generator
        if seeded is not None and seeded.device.type == "cpu" and not isinstance(seeded, RewindableGenerator):
            request.generator = RewindableGenerator(device="cpu")
            request.generator.manual_seed(seeded.initial_seed())
        return register(batch, request)

    InputBatch._register_add_request = register_rewindable
