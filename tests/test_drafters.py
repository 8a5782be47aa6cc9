"""What each drafter guesses, on hand-made contexts and on tiny models drafting for each other."""

from __future__ import annotations

import pytest
import tiny
import torch

from specdec import SpeculativeGenerator
from specdec.drafters import PromptLookup, SmallModel, TokenRecycling
from specdec.errors import ConfigError
from specdec.trees.tree import DraftTree
from specdec.types import DraftContext, PromptRows, StepOutcome, TargetInfo

VOCAB = 40


def context(tokens, row=0):
    return DraftContext(row, tokens, remaining=10)


def probabilities(law, handle=0):
    rows = law.rows([handle])
    pairs = zip(rows.ids[0].tolist(), rows.log_probs[0].exp().tolist(), strict=True)
    return {token: p for token, p in pairs if p > 0}


class TestPromptLookup:
    def started(self, **options):
        drafter = PromptLookup(**options)
        drafter.start(0, [], None)
        return drafter

    def test_continues_the_longest_match(self):
        law = self.started().law(context([1, 2, 3, 9, 5, 2, 3, 7, 1, 2, 3]))
        assert list(probabilities(law)) == [9]  # (1, 2, 3) -> 9 beats (2, 3) -> 7

    def test_weighs_several_continuations_by_count_and_age(self):
        law = self.started().law(context([4, 8, 4, 8, 4, 6, 4]))
        chances = probabilities(law)
        assert list(chances) == [6, 8]  # the latest first: 1 against 1/2 + 1/3
        assert chances[6] == pytest.approx(1 / (1 + 5 / 6 + 0.25))

    def test_follows_only_the_occurrences_that_agree(self):
        law = self.started().law(context([4, 8, 1, 4, 6, 2, 4]))
        assert list(probabilities(law, law.extend(0, 6))) == [2]
        assert list(probabilities(law, law.extend(0, 8))) == [1]

    def test_a_copy_ends_where_the_text_ends(self):
        law = self.started().law(context([5, 5, 5]))
        assert list(probabilities(law)) == [5]
        end = law.extend(law.extend(0, 5), 5)
        assert probabilities(law, end) == {}

    def test_no_match_gives_no_guess(self):
        assert probabilities(self.started().law(context([1, 2, 3]))) == {}

    def test_rows_do_not_see_each_other(self):
        drafter = self.started()
        drafter.start(1, [], None)
        drafter.law(context([1, 2, 3, 1], row=0))
        assert probabilities(drafter.law(context([7, 1], row=1))) == {}

    def test_a_law_keeps_to_the_text_it_was_asked_for(self):
        tokens = [1, 2, 1]
        law = self.started().law(context(tokens))
        tokens += [9, 9]
        assert probabilities(law, law.extend(law.extend(0, 2), 1)) == {}

    def test_bad_arguments(self):
        with pytest.raises(ConfigError, match="at least 1, got 0 and 16"):
            PromptLookup(max_matching_ngram_size=0)


class TestTokenRecycling:
    def attached(self, **options):
        drafter = TokenRecycling(num_successors=3, **options)
        drafter.attach(TargetInfo(VOCAB))
        return drafter

    def observe(self, drafter, tree, path, emitted, favourites):
        """Scores a tree whose node i favours the tokens `favourites[i]`, best first."""
        logits = torch.full((len(tree), VOCAB), -5.0)
        for node, tokens in enumerate(favourites):
            for rank, token in enumerate(tokens):
                logits[node, token] = 5.0 - rank
        drafter.observe([StepOutcome(0, tree, path, emitted, logits)])

    def test_every_node_is_recycled_accepted_or_not(self):
        drafter = self.attached()
        tree = DraftTree.from_lists([1, 2, 3], [-1, 0, 0])
        self.observe(drafter, tree, [1], [2, 7], [(2, 3, 4), (7, 8, 9), (10, 11, 12)])
        assert list(probabilities(drafter.law(context([1])))) == [2, 3, 4]
        assert list(probabilities(drafter.law(context([2])))) == [7, 8, 9]
        assert list(probabilities(drafter.law(context([3])))) == [10, 11, 12]

    def test_of_two_nodes_with_one_token_the_accepted_one_stays(self):
        drafter = self.attached()
        tree = DraftTree.from_lists([1, 2, 3, 2], [-1, 0, 0, 2])
        favourites = [(2, 3, 4), (7, 8, 9), (5, 6, 7), (10, 11, 12)]
        self.observe(drafter, tree, [1], [2, 7], favourites)
        assert list(probabilities(drafter.law(context([2])))) == [7, 8, 9]

    def test_unseen_tokens_have_no_children(self):
        assert probabilities(self.attached().law(context([5]))) == {}

    def test_prompt_positions_are_recycled_on_demand(self):
        rows = PromptRows(torch.tensor([[4, 5, 6], [7, 8, 9]]), torch.tensor([[3.0, 2, 1]] * 2))
        drafter = self.attached()
        drafter.start(0, [30, 1, 2], rows)  # the rows belong to the last two positions
        assert list(probabilities(drafter.law(context([2])))) == [7, 8, 9]
        assert probabilities(drafter.law(context([30]))) == {}
        assert self.attached(prompt_rows=False).needs.prompt_top_k == 0

    def test_chances_are_learned(self):
        drafter = self.attached()
        tree = DraftTree.root_only(1)
        self.observe(drafter, tree, [], [9], [(2, 3, 4)])
        before = probabilities(drafter.law(context([1])))[2]
        for _ in range(50):  # the first guess is always wrong
            self.observe(drafter, tree, [], [9], [(2, 3, 4)])
        assert probabilities(drafter.law(context([1])))[2] < 0.5 * before

    def test_rows_fall_and_never_exceed_one(self):
        drafter = self.attached()
        generator = torch.Generator().manual_seed(0)
        for token in range(VOCAB):
            logits = 4 * torch.randn(1, VOCAB, generator=generator)
            tree = DraftTree.root_only(token)
            drafter.observe([StepOutcome(0, tree, [], [int(logits.argmax())], logits)])
        for token in range(VOCAB):
            chances = drafter.guesses(token).chances
            assert len(chances) == 3
            assert list(chances) == sorted(chances, reverse=True)
            assert sum(chances) <= 1 + 1e-9

    def test_under_two_megabytes_at_32k(self):
        drafter = TokenRecycling()
        drafter.attach(TargetInfo(32_000))
        assert drafter.nbytes < 2_000_000

    def test_reset_forgets(self):
        drafter = self.attached()
        self.observe(drafter, DraftTree.root_only(1), [], [2], [(2, 3, 4)])
        drafter.reset()
        assert probabilities(drafter.law(context([1]))) == {}

    def test_refuses_another_vocabulary(self):
        drafter = self.attached()
        with pytest.raises(ConfigError, match="learned for 40 tokens, the target has 50"):
            drafter.attach(TargetInfo(50))


class TestSmallModel:
    @pytest.mark.parametrize(("policy", "budget"), [("chain", 4), ("best_first", 9)])
    @pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
    def test_a_model_drafting_for_itself_is_always_right(self, family, policy, budget):
        model = tiny.make_model(family)
        prompts = [tiny.prompt(length, seed=length) for length in (5, 11, 8)]
        batch = tiny.padded(prompts)
        generator = SpeculativeGenerator(
            model, drafter=SmallModel(model), policy=policy, node_budget=budget
        )
        output = generator.generate(**batch, do_sample=False, max_new_tokens=30)
        for row, prompt in enumerate(prompts):
            alone = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                do_sample=False,
                max_new_tokens=30,
            )
            assert output[row, 11:].tolist() == alone[0, len(prompt) :].tolist()
        histogram = generator.stats.acceptance_histogram
        assert generator.stats.num_accepted > 30
        # only a last step, cut by the length, may accept less than a level
        assert sum(histogram[:1]) <= len(prompts)

    def test_assistant_model_is_an_alias(self):
        model = tiny.make_model("llama")
        generator = SpeculativeGenerator(model, drafter=None)
        ids = tiny.ids(tiny.prompt(6))
        arguments = {"do_sample": False, "max_new_tokens": 20}
        plain = generator.generate(ids, **arguments)
        assisted = generator.generate(ids, assistant_model=model, **arguments)
        assert torch.equal(plain, assisted)
        assert generator.stats.settings["drafter"] == "small_model"
        assert generator.stats.acceptance_rate == 1.0

    def test_refuses_a_model_of_another_vocabulary(self):
        target = tiny.make_model("llama")
        drafter = SmallModel(target)
        with pytest.raises(ConfigError, match="tokenizers do not fit"):
            drafter.attach(TargetInfo(10 * tiny.VOCAB))

    def test_the_name_alone_says_what_is_missing(self):
        with pytest.raises(ConfigError, match="needs a model"):
            SpeculativeGenerator(tiny.make_model("llama"), drafter="small_model")
