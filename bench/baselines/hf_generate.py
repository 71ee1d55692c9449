"""transformers' GPT2LMHeadModel of the same size: generate with its cache, and a training step."""

from typing import Any

import torch

from baselines import Unsuitable

MEASURES = ("generate", "train_transformer")


def version() -> str:
    import transformers
    from transformers import GPT2LMHeadModel  # noqa: F401  is it importable?

    return f"transformers {transformers.__version__}"


def make(measure: str, case: Any, inputs: tuple) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    if measure != "generate" and case.dtype not in ("fp32", "bf16"):
        raise Unsuitable("trains in fp32 and bf16")
    config = inputs[0].config
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size + 1,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device(case.device):
        model = GPT2LMHeadModel(shape)
    run = _generate if measure == "generate" else _train_step
    return run(model, case, *inputs[1:])


def _generate(model: Any, case: Any, cond: torch.Tensor) -> Any:
    model = model.eval().to(torch.float32 if case.dtype == "fp32" else torch.bfloat16)
    mask = torch.ones_like(cond)

    def run(n: int) -> torch.Tensor:
        length = {"max_new_tokens": n, "min_new_tokens": n}
        return model.generate(cond, attention_mask=mask, do_sample=True, top_k=100, **length)

    return run


def _train_step(model: Any, case: Any, idx: torch.Tensor, cond: torch.Tensor) -> Any:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    tokens = torch.cat([cond, idx], 1).to(case.device)
    targets = tokens.clone()
    targets[:, : cond.shape[1]] = -100  # the condition is read but not predicted

    def step() -> torch.Tensor:
        with torch.autocast(case.device, torch.bfloat16, enabled=case.dtype == "bf16"):
            loss = model(tokens, labels=targets).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
