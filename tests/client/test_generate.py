"""Streams and batches: the same tokens as one text alone, the same number of messages, the same charges."""

from __future__ import annotations

import pytest
import torch

from securesplit.client.generate import Piece
from securesplit.client.sampling import Sampling
from securesplit.errors import BudgetExhausted, InputError
from securesplit.privacy.ledger import Charge
from securesplit.privacy.plan import enforced_epsilon
from securesplit.protocol.messages import DropCache, Forward
from tests.e2e.house import FROZEN, build_house, build_model, build_tokenizer, policy_of, sentences

PROMPTS = sentences(7, seed=41)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """One for all tests here: they leave nothing behind in it."""
    return build_house(tmp_path_factory.mktemp("site") / "house")


def endless(client):
    """Without the model's own end, so that lengths are exact."""
    client.tokenizer.eos_token = None
    return client


def greedy(prompt: str, count: int, *, end: int | None = None) -> list[int]:
    """The unsplit model's own tokens."""
    model, rows = build_model(), torch.tensor([build_tokenizer().encode(prompt)])
    with torch.no_grad():
        made = model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=0,
        )
    return made[0, rows.shape[1] :].tolist()  # fmt: skip


def test_a_stream_is_the_text_in_pieces_and_its_last_piece_says_why(house):
    client = endless(house.joined(house.job(), policy_of())[0])
    want = greedy(PROMPTS[0], 9)
    pieces = list(client.stream(PROMPTS[0], max_new_tokens=9))
    made = client.generate(PROMPTS[0], max_new_tokens=9)
    assert [p.token for p in pieces if p.token is not None] == want == list(made.tokens)
    assert "".join(p.text for p in pieces) == made.text == client.tokenizer.decode(want)
    assert [p.finish for p in pieces] == [None] * 9 + ["length"]
    assert made.finish == "length"
    assert made.prompt_tokens == len(PROMPTS[0].split())
    with pytest.raises(AttributeError):
        pieces[0].text = "x"


def test_the_models_own_end_ends_a_stream(house):
    client, spy, core = house.joined(house.job(), policy_of())
    want = greedy(PROMPTS[0], 9)
    client.tokenizer.eos_token = client.tokenizer.convert_ids_to_tokens(want[4])
    first = want.index(want[4])
    pieces = list(client.stream(PROMPTS[0], max_new_tokens=9))
    assert [p.token for p in pieces] == [*want[:first], None]
    assert pieces[-1] == Piece("", None, "stop")
    assert len(spy.messages(Forward)) == first + 1, "without noise nothing is sent for nothing"
    assert len(spy.messages(DropCache)) == 1
    assert core._engine.caches.kept == {}


def test_a_stop_text_ends_it_and_is_no_part_of_it(house):
    client = endless(house.joined(house.job(), policy_of())[0])
    want = greedy(PROMPTS[1], 9)
    whole = client.tokenizer.decode(want)
    words = whole.split()
    stop = f"{words[3][1:]} {words[4][:1]}"  # Across two tokens.
    sampling = Sampling(stop=("never there", stop))
    made = client.generate(PROMPTS[1], max_new_tokens=9, sampling=sampling)
    pieces = list(client.stream(PROMPTS[1], max_new_tokens=9, sampling=sampling))
    assert made.text == "".join(p.text for p in pieces) == whole[: whole.index(stop)]
    assert made.finish == pieces[-1].finish == "stop"
    assert len(made.tokens) <= 5
    shown = ""
    for piece in pieces:
        shown += piece.text
        assert stop not in shown


def test_a_batch_is_each_text_alone_token_for_token(house):
    client, spy, core = house.joined(house.job(), policy_of())
    endless(client)
    made = client.generate_batch(PROMPTS, max_new_tokens=8)
    assert [list(m.tokens) for m in made] == [greedy(p, 8) for p in PROMPTS]
    assert [m.text for m in made] == [client.generate(p, max_new_tokens=8).text for p in PROMPTS]
    assert len({m.prompt_tokens for m in made}) > 2, "several lengths"
    assert [len(m.lengths) for m in spy.messages(Forward)[:8]] == [len(PROMPTS)] * 8, "one message for each token"
    assert core._engine.caches.kept == {}
    assert client.generate_batch([]) == ()


def test_texts_of_a_batch_end_each_at_its_own_place(house):
    client = house.joined(house.job(), policy_of())[0]
    last = {client.tokenizer.encode(p)[-1] for p in PROMPTS}  # A prompt that ends like a text would lose its end.
    end = next(t for t in greedy(PROMPTS[0], 9) if t not in last)
    client.tokenizer.eos_token = client.tokenizer.convert_ids_to_tokens(end)
    made = client.generate_batch(PROMPTS, max_new_tokens=9)
    for m, prompt in zip(made, PROMPTS, strict=True):
        want = greedy(prompt, 9, end=end)
        assert list(m.tokens) == [t for t in want if t != end]
        assert m.finish == ("stop" if end in want else "length")
    assert {m.finish for m in made} == {"stop", "length"}


def test_sampled_texts_do_not_depend_on_who_stands_beside_them(house):
    client = endless(house.joined(house.job(), policy_of())[0])
    sampling = Sampling(1.5, seed=9, top_k=20, top_p=0.95, repetition_penalty=1.2)
    alone = [client.generate(p, max_new_tokens=6, sampling=sampling).tokens for p in PROMPTS[:3]]
    assert [m.tokens for m in client.generate_batch(PROMPTS[:3], max_new_tokens=6, sampling=sampling)] == alone
    other = Sampling(1.5, seed=10, top_k=20, top_p=0.95, repetition_penalty=1.2)
    assert client.generate(PROMPTS[0], max_new_tokens=6, sampling=other).tokens != alone[0]


def test_a_repetition_penalty_looks_at_the_prompt_and_not_at_its_padding(house):
    client = endless(house.joined(house.job(), policy_of())[0])
    plain = client.generate(PROMPTS[0], max_new_tokens=12)
    never = client.generate(PROMPTS[0], max_new_tokens=12, sampling=Sampling(repetition_penalty=1e6))
    assert len(set(never.tokens)) == len(never.tokens), "nothing comes twice"
    assert not set(never.tokens) & set(client.tokenizer.encode(PROMPTS[0]))
    assert never.tokens != plain.tokens


def test_more_texts_than_a_message_takes_cross_one_part_after_the_other(house):
    client, spy, _ = house.joined(house.job(), policy_of(max_sequences=4))
    endless(client)
    made = client.generate_batch(PROMPTS, max_new_tokens=3)
    assert [list(m.tokens) for m in made] == [greedy(p, 3) for p in PROMPTS]
    assert {len(m.lengths) for m in spy.messages(Forward)} == {4, 3}


def test_tokens_are_a_prompt_like_text(house):
    client = endless(house.joined(house.job(), policy_of())[0])
    ids = tuple(client.tokenizer.encode(PROMPTS[2]))
    assert client.generate(ids, max_new_tokens=5) == client.generate(PROMPTS[2], max_new_tokens=5)


def test_what_cannot_be_is_refused_before_anything_is_sent(house):
    client, spy, _ = house.joined(house.job(), policy_of())
    sent = len(spy.sent)
    for prompt, count, code in (
        ((), 3, "SS-1441"), ((3, 64), 3, "SS-1441"), ((-1,), 3, "SS-1441"), ("w4", 65, "SS-1260"), (PROMPTS[0], 64, "SS-1260"),
    ):  # fmt: skip
        for call in (client.generate, client.stream, lambda p, **o: client.generate_batch(["w4", p], **o)):
            with pytest.raises(InputError, match=code):
                call(prompt, max_new_tokens=count)
    assert len(spy.sent) == sent
    assert len(client.generate("w4", max_new_tokens=64).tokens) <= 64, "to the last position"


@pytest.mark.parametrize("read", [0, 1, 3, 99])
def test_under_a_policy_as_much_crosses_whoever_reads(house, open_ledger, read):
    """A reader who goes away, and a text that ends, tell the server nothing."""
    ledger = open_ledger()
    client, spy, core = house.joined(house.job(), policy_of(FROZEN), ledger=ledger)
    if read == 99:  # The text ends by itself.
        client.tokenizer.eos_token_id, pieces = (
            None,
            list(client.stream("w4 w5", max_new_tokens=6, sampling=Sampling(stop=("w",)))),
        )
        assert pieces[-1].finish == "stop"
    else:
        endless(client)
        pieces = client.stream("w4 w5", max_new_tokens=6)
        for _ in range(read):
            next(pieces)
        pieces.close()
    asked = 0 if read == 0 else 6
    assert len(spy.messages(Forward)) == asked
    assert {e.channel: e.releases for e in ledger.summary()} == ({} if read == 0 else {"cut": 1, "decode": 5})
    assert core._engine.caches.kept == {}


def test_a_batch_under_a_policy_is_charged_text_by_text_and_shares_messages_by_bucket(house, open_ledger):
    ledger = open_ledger()
    client, spy, _ = house.joined(house.job(), policy_of(FROZEN), ledger=ledger)
    endless(client)
    made = client.generate_batch(["w4 w5", "w6 w7 w8", "w9 w10 w11 w12 w13"], max_new_tokens=3)
    assert [len(m.tokens) for m in made] == [3, 3, 3]
    assert [m.lengths for m in spy.messages(Forward)] == [(4, 4), (8,), (1, 1), (1,), (1, 1), (1,)]
    assert {e.channel: e.releases for e in ledger.summary()} == {"cut": 3, "decode": 6}
    assert {m.epsilon is not None and m.epsilon > 0 for m in made} == {True}
    # Eight releases are this site's part of the channel; six are gone.
    sent, head = len(spy.sent), ledger.head()
    with pytest.raises(BudgetExhausted, match="SS-500"):
        client.generate_batch(["w4 w5", "w6 w7 w8"], max_new_tokens=3)
    assert (len(spy.sent), ledger.head()) == (sent, head)


def test_what_a_batch_says_it_cost_is_what_was_spent_when_all_of_it_is_done(house, open_ledger):
    """A fed-back token is at the expense of all records, those of texts that crossed before it included."""
    ledger = open_ledger()
    client, _, _ = house.joined(house.job(), policy_of(FROZEN, max_sequences=4), ledger=ledger)
    prompts = ["w4 w5", "w6 w7 w8", "w9 w10 w11", "w12 w13 w14", "w15 w16 w17 w18 w19"]
    made = endless(client).generate_batch(prompts, max_new_tokens=2)
    spent = [enforced_epsilon(ledger.mu(ledger.key(prompt.encode())), 1e-5) for prompt in prompts]
    assert [one.epsilon for one in made] == spent


@pytest.mark.parametrize("broken", [1, 3])
def test_a_fault_of_the_tokenizer_in_a_batch_does_not_show_in_the_number_of_messages(house, open_ledger, broken):
    client, spy, core = house.joined(house.job(), policy_of(FROZEN), ledger=open_ledger())
    endless(client)
    whole, calls = client.tokenizer.decode, 0

    def decode(*args, **options):
        nonlocal calls
        calls += 1
        if calls >= broken:
            raise TypeError("an id without a token")
        return whole(*args, **options)

    client.tokenizer.decode = decode
    with pytest.raises(TypeError):
        client.generate_batch([tuple(client.tokenizer.encode("w4 w5"))], max_new_tokens=5)
    assert len(spy.messages(Forward)) in ((0, 5) if broken == 1 else (5,))
    assert core._engine.caches.kept == {}


def test_what_a_prompt_takes_is_counted_before_the_first_byte_leaves(house, open_ledger):
    """Its record has spent much under another policy: alone it can be paid, and so can the tokens, but not together."""
    ledger = open_ledger()
    client, spy, _ = house.joined(house.job(), policy_of(FROZEN), ledger=ledger)
    plan = endless(client).gate.plan
    spent = Charge(
        record=ledger.key(b"w4 w5"), channel="gradient", units=plan.budget - plan.cut.units - 3 * plan.decode.units,
        clip=1.0, sigma=1.0, version="then", policy="another", unit="sequence",
    )  # fmt: skip
    ledger.charge([spent], budget=plan.budget, caps=[1])
    with pytest.raises(BudgetExhausted, match="SS-5001"):
        client.generate("w4 w5", max_new_tokens=6)
    assert spy.messages(Forward) == []
    assert len(client.generate("w4 w5", max_new_tokens=4).tokens) == 4
