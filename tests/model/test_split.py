"""The parts in a row against the unsplit model, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch

from securesplit.errors import InputError
from securesplit.model.architectures import ARCHITECTURES
from securesplit.model.plan import CutPlan
from securesplit.model.split import split_model

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "glm", "glm4")
TITLES = {architecture.model_type: architecture.title for architecture in ARCHITECTURES}
CUTS = (CutPlan(2, 2), CutPlan(0, 0), CutPlan(0, 3), CutPlan(3, 0), CutPlan(1, 4))
T = 9


def batch(padding):
    """Token ids (2, T), a mask or None, and labels with -100 at padding and at one real token."""
    ids = torch.randint(1, 97, (2, T), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :3] = 0
    if padding == "right":
        mask[0, -3:] = 0
    labels = torch.where(mask == 1, ids, -100)
    labels[1, 4] = -100
    return ids.masked_fill(mask == 0, 0), None if padding == "none" else mask, labels


def run(split, ids, mask, labels=None):
    return split.back(split.middle(split.front(ids, mask), mask), labels, mask)


def largest(a, b):
    assert a.shape == b.shape
    # A NaN must never look like a zero, and max() over Python numbers would skip it.
    return (a - b).abs().nan_to_num(nan=torch.inf).max().item()


def test_every_supported_family_is_tested():
    assert set(FAMILIES) == set(TITLES)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_every_gradient_equal_the_whole(tiny, equality, family, tied):
    model = tiny(family, tied=tied)
    whole = copy.deepcopy(model)
    assert (whole.get_output_embeddings().weight is whole.get_input_embeddings().weight) == tied
    for padding in ("none", "left", "right"):
        ids, mask, labels = batch(padding)
        whole.zero_grad()
        expected = whole(ids, attention_mask=mask, labels=labels)
        expected.loss.backward()
        gradients = {name: p.grad for name, p in whole.named_parameters()}
        assert all(g is not None for g in gradients.values())
        for plan in CUTS:
            split = split_model(model, plan)
            model.zero_grad()
            with torch.no_grad():
                equality(TITLES[family], "logits", largest(run(split, ids, mask), expected.logits))
                assert largest(run(split, ids, mask), expected.logits) == 0.0
            loss = run(split, ids, mask, labels)
            loss.backward()
            worst = max(largest(p.grad, gradients[name]) for name, p in model.named_parameters())
            equality(TITLES[family], "loss", largest(loss, expected.loss))
            equality(TITLES[family], "gradients", worst)
            assert largest(loss, expected.loss) == 0.0
            assert worst == 0.0
    # The comparison is not of zeros with zeros.
    assert sum(bool(g.abs().sum() > 0) for g in gradients.values()) >= 0.9 * len(gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_through_the_graph_gives_the_same_gradients(tiny, family):
    """As over the wire: each party has a graph of its own, and only values cross."""
    model = tiny(family)
    whole = copy.deepcopy(model)
    ids, _, labels = batch("none")
    whole(ids, labels=labels).loss.backward()
    split = split_model(model, CutPlan(2, 2))
    a = split.front(ids)
    a_wire = a.detach().requires_grad_()
    b = split.middle(a_wire)
    b_wire = b.detach().requires_grad_()
    split.back(b_wire, labels).backward()
    b.backward(b_wire.grad)
    a.backward(a_wire.grad)
    for (name, mine), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert largest(mine.grad, theirs.grad) == 0.0, name


@pytest.mark.parametrize("family", FAMILIES)
def test_right_padding_without_a_mask_leaves_real_positions_alone(tiny, family):
    """Only bucketed rows cross, and no mask: causality keeps what is right of a position out of it."""
    model = tiny(family)
    split = split_model(model, CutPlan(2, 2))
    ids, mask, labels = batch("right")
    with torch.no_grad():
        unmasked = run(split, ids, None)
        assert largest(unmasked, model(ids).logits) == 0.0
        real = mask.bool()
        torch.testing.assert_close(unmasked[real], model(ids, attention_mask=mask).logits[real], rtol=1e-5, atol=1e-5)
        alone = model(ids[:1, : T - 3]).logits
        torch.testing.assert_close(unmasked[:1, : T - 3], alone, rtol=1e-5, atol=1e-5)
        client_masks = split.back(split.middle(split.front(ids, mask)), attention_mask=mask)
        torch.testing.assert_close(client_masks[real], unmasked[real], rtol=1e-5, atol=1e-5)
        losses = [
            split.back(split.middle(split.front(ids)), labels),
            model(ids, attention_mask=mask, labels=labels).loss,
        ]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_with_a_cache_in_each_part_gives_the_same_tokens(tiny, equality, family):
    model = tiny(family)
    for rows, plan in ((1, CutPlan(2, 2)), (3, CutPlan(0, 0)), (2, CutPlan(1, 3))):
        prompt = torch.randint(1, 97, (rows, 6), generator=torch.Generator().manual_seed(rows))
        expected = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=14,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        split = split_model(model, plan)
        parts = (split.front, split.middle, split.back)
        caches = [part.new_cache() for part in parts]
        step, tokens, worst = prompt, [prompt], 0.0
        for logits in expected.logits:
            with torch.no_grad():
                hidden = split.middle(split.front(step, cache=caches[0]), cache=caches[1])
                mine = split.back(hidden, cache=caches[2], logits_to_keep=1)[:, -1]
            worst = max(worst, largest(mine, logits))
            step = mine.argmax(-1, keepdim=True)
            tokens.append(step)
        equality(TITLES[family], "decoding", worst)
        assert torch.equal(torch.cat(tokens, dim=1), expected.sequences)
        assert worst == 0.0
        assert all(cache.length == 6 + 13 for cache in caches)
        assert [cache.nbytes > 0 for cache in caches] == [bool(part.span) for part in parts]


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2", "gemma3_text", "phi3"])
def test_the_sliding_window_matters_in_these_tests(tiny, family):
    ids, _, _ = batch("none")
    with torch.no_grad():
        narrow = tiny(family)(ids).logits
        wide = tiny(family, sliding_window=64)(ids).logits
    assert largest(narrow, wide) > 0


def test_a_part_holds_only_its_own_tensors(tiny):
    model = tiny("gpt2", tied=True)
    split = split_model(model, CutPlan(1, 2))
    names = {
        part.role: {part.global_name(n) for n, _ in part.module.named_parameters()}
        for part in (split.front, split.middle, split.back)
    }
    assert {n for n in names["front"] if ".h." not in n} == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert {n for n in names["middle"] if ".h." not in n} == set()
    assert {n for n in names["back"] if ".h." not in n} == {
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
        "lm_head.weight",
    }
    assert {n.split(".")[2] for n in names["middle"]} == {"1", "2", "3"}
    assert names["front"] | names["middle"] | names["back"] == set(model.state_dict())
    assert split.front.module.wte.weight is model.transformer.wte.weight, "shared, not copied"
    assert split.back.module.lm_head.weight is model.lm_head.weight


def test_positions_and_dropout_happen_once(tiny):
    """GPT-2 in training mode: with the layers' own dropout off, only the front may drop."""
    model = tiny("gpt2", embd_pdrop=0.5, attn_pdrop=0.0, resid_pdrop=0.0)
    split = split_model(model.train(), CutPlan(0, 0))
    hidden = torch.randn(1, T, 32)
    assert largest(split.middle(hidden), split.middle(hidden)) == 0.0
    ids, _, _ = batch("none")
    assert largest(split.front(ids), split.front(ids)) > 0


def test_half_precision_stays_half_precision(tiny):
    for family in ("llama", "gpt2", "gemma2"):
        model = tiny(family).to(torch.bfloat16)
        split = split_model(model, CutPlan(1, 1))
        ids, _, _ = batch("none")
        with torch.no_grad():
            hidden = split.front(ids)
            assert hidden.dtype == torch.bfloat16
            assert largest(run(split, ids, None), model(ids).logits) == 0.0
            assert split.middle(hidden.float()).dtype == torch.bfloat16, "what arrives is cast to the part's own type"


@pytest.mark.parametrize("plan", [CutPlan(3, 3), CutPlan(6, 0), CutPlan(0, 6), CutPlan(99, 99)])
def test_a_cut_without_a_middle_is_refused(tiny, plan):
    with pytest.raises(InputError, match="SS-1400"):
        split_model(tiny("llama"), plan)


def test_an_unsupported_family_is_refused_with_the_list():
    from transformers import AutoModelForCausalLM, OPTConfig

    config = OPTConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=3, ffn_dim=8, num_attention_heads=2, word_embed_proj_dim=8
    )
    with pytest.raises(InputError, match="SS-1401") as caught:
        split_model(AutoModelForCausalLM.from_config(config), CutPlan(1, 1))
    assert all(title in caught.value.hint for title in TITLES.values())


def test_variants_that_cannot_be_split_are_refused(tiny):
    with pytest.raises(InputError, match="SS-1402"):
        split_model(tiny("gpt2", scale_attn_by_inverse_layer_idx=True), CutPlan(1, 1))
    with pytest.raises(InputError, match="SS-1401"):
        split_model(tiny("llama").model, CutPlan(1, 1))
