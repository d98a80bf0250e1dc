"""What a turn costs, against the policy's own maths by hand; and nothing leaves where it cannot be paid."""

from __future__ import annotations

import math

import pytest

from securesplit.client.chat.conversation import Conversation
from securesplit.client.chat.toll import Toll, tokens_left
from securesplit.client.chat.turn import prepare, prepare_text, speak
from securesplit.client.sampling import Sampling
from securesplit.errors import BudgetExhausted, InputError, PolicyDenied
from securesplit.privacy.calibrate import epsilon_for, epsilon_rdp_for, mu_for, mu_rdp_for
from tests.e2e.house import FROZEN, SILENT, policy_of

# Several releases of what was said are possible here: three prompts, and 8 tokens for each of three sites.
ROOMY = FROZEN.replace("releases = 1", "releases = 3")
GREEDY = Sampling()


def mu_squared() -> float:
    return min(mu_for(8.0, 1e-5), mu_rdp_for(8.0, 1e-5)) ** 2


def epsilon(share: float) -> float:
    mu = math.sqrt(share * mu_squared())
    return max(epsilon_for(mu, 1e-5), epsilon_rdp_for(mu, 1e-5)) if mu else 0.0


def joined(house, open_ledger, privacy):
    policy = policy_of(privacy)
    return house.joined(house.job(), policy, ledger=open_ledger())


def talk(client, toll, conversation, count=2):
    turn = prepare(client, toll, conversation, max_new_tokens=count, sampling=GREEDY)
    answer = "".join(piece.text for piece in speak(client, toll, turn))
    return turn, answer


def test_each_turn_of_a_conversation_adds_to_what_was_said_first(house, open_ledger):
    client, _, _ = joined(house, open_ledger, ROOMY)
    toll, conversation = Toll(), Conversation()
    seen = []
    for word in ("w3", "w4"):
        conversation = conversation.said("user", word)
        turn, answer = talk(client, toll, conversation)
        conversation = conversation.said("assistant", answer)
        seen.append((turn.price.before, turn.price.after, turn.price.tokens_left))
    cut, token = 0.6 / 3, 0.4 / 24
    assert seen[0] == (0.0, pytest.approx(epsilon(cut + token), rel=1e-6), 7)
    assert seen[1][0] == pytest.approx(epsilon(cut + token), rel=1e-6)
    assert seen[1][1] == pytest.approx(epsilon(2 * cut + 2 * token), rel=1e-6)
    assert seen[1][2] == tokens_left(client) == 6
    assert "of 8 at delta 1e-05, unit sequence, replace-one; 6 generated tokens left" in str(turn.price)


def test_a_conversation_ends_where_its_first_words_have_spent_the_budget(house, open_ledger):
    """With one release of a prompt, a second turn would be a second release of the first question."""
    client, spy, _ = joined(house, open_ledger, FROZEN)
    toll, conversation = Toll(), Conversation().said("user", "w3")
    _, answer = talk(client, toll, conversation)
    sent, entries = len(spy.sent), len(list(client.ledger.entries()))
    with pytest.raises(BudgetExhausted) as caught:
        talk(client, toll, conversation.said("assistant", answer).said("user", "w4"))
    assert caught.value.code == "SS-5001"
    assert "this conversation" in caught.value.what
    assert (len(spy.sent), len(list(client.ledger.entries()))) == (sent, entries), "nothing was sent, nothing charged"
    # Another conversation is another record; the same prompt again is resent, not drawn anew.
    talk(client, toll, Conversation().said("user", "w9"))
    turn, _ = talk(client, toll, conversation)
    assert turn.price.after == pytest.approx(epsilon(0.6 + 3 * 0.4 / 24), rel=1e-6)


def test_a_window_that_forgets_the_first_turn_does_not_hide_the_later_ones(house, open_ledger):
    client, _, _ = joined(house, open_ledger, FROZEN)
    toll = Toll()
    talk(client, toll, Conversation().said("user", "w3").said("assistant", "w5").said("user", "w4"))
    with pytest.raises(BudgetExhausted, match="SS-5001"):
        talk(client, toll, Conversation().said("user", "w4"))


def test_each_turn_alone_is_the_ledger_s_own_count_and_the_price_still_tells_the_sum(house, open_ledger):
    client, _, _ = joined(house, open_ledger, FROZEN)
    toll, conversation = Toll(each_turn_alone=True), Conversation()
    for word in ("w3", "w4"):
        conversation = conversation.said("user", word)
        turn, answer = talk(client, toll, conversation)
        conversation = conversation.said("assistant", answer)
    assert turn.price.after == pytest.approx(epsilon(2 * 0.6 + 2 * 0.4 / 24), rel=1e-6)
    assert turn.price.after > turn.price.budget


def test_too_many_tokens_are_refused_before_the_prompt_leaves(house, open_ledger):
    client, spy, _ = joined(house, open_ledger, FROZEN)
    sent = len(spy.sent)
    with pytest.raises(BudgetExhausted, match="SS-500"):
        talk(client, Toll(), Conversation().said("user", "w3"), count=10)  # Nine are fed back, eight are this site's.
    assert len(spy.sent) == sent
    turn, _ = talk(client, Toll(), Conversation().said("user", "w3"), count=9)
    assert turn.price.tokens_left == 0
    assert tokens_left(client) == 0


def test_what_the_client_refuses_is_not_counted(house, open_ledger):
    client, spy, _ = joined(house, open_ledger, FROZEN)
    toll, words = Toll(), "w3 " * 40
    turn, sent = prepare_text(client, toll, words, max_new_tokens=2, sampling=Sampling()), len(spy.sent)
    with pytest.raises(InputError, match="SS-1222"):
        next(speak(client, toll, turn))
    assert len(spy.sent) == sent
    assert toll.price(client, (words,), (9,), 1).before == 0.0


def test_a_policy_without_generation_denies(house, open_ledger):
    client, spy, _ = joined(house, open_ledger, SILENT.replace("share = 0.6", "share = 1.0"))
    sent = len(spy.sent)
    with pytest.raises(PolicyDenied, match="SS-2010"):
        talk(client, Toll(), Conversation().said("user", "w3"))
    assert len(spy.sent) == sent
    assert tokens_left(client) == 0


def test_under_unit_user_everybody_pays_for_every_prompt(house, open_ledger):
    client, _, _ = joined(house, open_ledger, ROOMY.replace('unit = "sequence"', 'unit = "user"'))
    toll = Toll()
    talk(client, toll, Conversation().said("user", "w3"))
    turn, _ = talk(client, toll, Conversation().said("user", "w4"))
    assert turn.price.before == pytest.approx(epsilon(0.2 + 0.4 / 24), rel=1e-6)
    assert turn.price.after == pytest.approx(epsilon(0.4 + 2 * 0.4 / 24), rel=1e-6)
    assert turn.price.meaning.unit == "user"


def test_without_protection_nothing_is_counted(house):
    client, _, _ = house.joined(house.job(blind=False), policy_of())
    turn = prepare_text(client, Toll(), "w3 w4", max_new_tokens=3, sampling=GREEDY)
    assert turn.price is None
    assert turn.prompt == tuple(client.tokenizer.encode("w3 w4"))
    assert "".join(p.text for p in speak(client, Toll(), turn)) == client.generate("w3 w4", max_new_tokens=3).text
