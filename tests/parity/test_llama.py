"""Text only, our trunk is Llama: the same weights give the same logits as transformers' LlamaForCausalLM."""

from __future__ import annotations

import pytest
import torch
from conftest import randomised, tiny

from transfuse.model import dense
from transfuse.model.llama import llama_config, llama_weights
from transfuse.sequence import Document, Grammar, Text, collate

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("variant", [{}, {"kv_heads": 2}, {"heads": 2, "hidden": 160, "rope_theta": 500000.0}], ids=str)
def test_logits_equal_llama(variant) -> None:
    config = tiny(**variant)
    model = randomised(config).eval()
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama_config(config))).eval()
    result = theirs.load_state_dict(llama_weights(model), strict=True)
    assert not result.missing_keys
    batch = collate([Document([Text(tuple(range(4, 60)))])], Grammar(0, 1, 2, 3, 2))
    with torch.no_grad():
        ours = model(batch.tokens, batch.rotary, dense(batch), torch.arange(batch.positions)).logits
        expected = theirs(batch.tokens[None]).logits[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
