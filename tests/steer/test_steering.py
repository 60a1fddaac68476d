"""The hook contract: edited rows equal eager attention, what is not edited is as before, and nothing stays behind."""

from dataclasses import dataclass, field

import pytest
import torch
from transformers import StaticCache

from glocal.hf import adapt
from glocal.steer.method import Method, layer_range
from glocal.steer.steering import Steering, language_layers
from tests.steer import models

GREEDY = dict(max_new_tokens=6, do_sample=False, suppress_tokens=[models.IMAGE])
EVERY = [*models.VISION, *models.TEXT]


@dataclass
class Watch(Method):
    """Reads scores and weights, and changes nothing; ``last`` for the newest row only."""

    last: bool = False
    seen: list = field(default_factory=list)
    sites: list = field(default_factory=list)
    begun: int = 0
    ended: int = 0

    def begin(self, run):
        self.begun += 1
        self.seen, self.sites = [], []

    def end(self, run):
        self.ended += 1

    def edits(self, site):
        return True

    def rows(self, site):
        return site.last if self.last else None

    def weights(self, site, weights):
        self.seen.append(weights)
        self.sites.append(site)
        return weights


@dataclass
class Double(Method):
    """Doubles the scores of keys of a kind, for the newest row."""

    kind: str = "image"
    factor: float = 2.0

    def edits(self, site):
        return True

    def rows(self, site):
        return site.last

    def scores(self, site, scores):
        return torch.where(site.where(self.kind)[:, None, None], scores * self.factor, scores)


@pytest.mark.parametrize("name", EVERY)
def test_a_method_that_changes_nothing_leaves_the_text_as_it_is(name):
    model = models.build(name)
    inputs = models.inputs(name, model)
    plain = model.generate(**inputs, **GREEDY)
    state = dict(vars(model))
    for last in (False, True):
        with Watch(model, last=last):
            assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    assert vars(model) == state and torch.equal(model.generate(**inputs, **GREEDY), plain)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "blip_2", "mistral"])
def test_the_weights_are_those_of_eager_attention(name):
    model = models.build(name)
    inputs = models.inputs(name, model)
    with torch.no_grad(), Watch(model) as watch:
        model(**inputs, use_cache=False)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**inputs, use_cache=False, output_attentions=True)
    wanted = getattr(output, "language_model_outputs", output).attentions
    assert len(watch.seen) == len(wanted) == 3
    real = inputs["attention_mask"].bool()
    for mine, theirs in zip(watch.seen, wanted, strict=True):
        for row in range(2):  # queries that are padding see nothing here, anything there
            assert torch.allclose(mine[row, :, real[row]], theirs[row, :, real[row]], atol=1e-6)


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "gemma3", "qwen2"])
def test_edited_rows_equal_a_bias_in_eager_attention(name):
    """Doubling the scores of the question is adding them once more: done by hand inside eager attention."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    model = models.build(name)
    inputs = models.inputs(name, model)
    with torch.no_grad(), Double(model, kind="question", layers=[1]):
        mine = model(**inputs, use_cache=False).logits[:, -1]
    plain_ids = inputs["input_ids"]
    image = plain_ids == models.IMAGE
    question = (~image & (plain_ids != 0)) & ((image.cumsum(1) > 0) | ~image.any(1, keepdim=True))

    def eager(module, query, key, value, attention_mask, scaling=None, softcap=None, **options):
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if module.layer_idx == 1:
            scores[:, :, -1] = torch.where(question[:, None], scores[:, :, -1] * 2, scores[:, :, -1])
        return ((scores + attention_mask).softmax(-1) @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("by_hand", eager)
    AttentionMaskInterface.register("by_hand", eager_mask)
    model.set_attn_implementation({"": "eager", "text_config": "by_hand"} if name in models.VISION else "by_hand")
    with torch.no_grad():
        wanted = model(**inputs, use_cache=False).logits[:, -1]
    assert torch.allclose(mine, wanted, atol=2e-5)


def test_only_the_rows_asked_for_are_computed_and_the_others_stay():
    model = models.build("llama")
    inputs = models.inputs("llama", model)
    with torch.no_grad():
        plain = model(**inputs).logits
        with Double(model, kind="question") as method, Watch(model, last=True) as watch:
            steered = model(**inputs).logits
    assert method.numbers == {0, 1, 2}
    assert torch.allclose(steered[:, :-1], plain[:, :-1], atol=1e-5)
    assert not torch.allclose(steered[:, -1], plain[:, -1], atol=1e-2)
    assert {tuple(weights.shape) for weights in watch.seen} == {(2, 4, 1, 8)}


def test_rows_are_split_where_they_are_many(monkeypatch):
    from glocal.steer import steering

    model = models.build("llava")
    inputs = models.inputs("llava", model)
    with torch.no_grad(), Watch(model) as watch:
        whole = model(**inputs).logits
        monkeypatch.setattr(steering, "_BUDGET", 2 * 4 * 24 * 5)
        parts = model(**inputs).logits
    assert torch.allclose(whole, parts, atol=1e-6)
    assert [weights.shape[2] for weights in watch.seen[:5]] == [5, 5, 5, 5, 4]


def test_phase_step_and_positions():
    model = models.build("llava")
    inputs = models.inputs("llava", model)
    with Watch(model) as watch:
        model.generate(**inputs, **GREEDY)
    assert (watch.begun, watch.ended) == (1, 1)
    first = watch.sites[:3]
    assert [site.layer for site in first] == [0, 1, 2] and all(site.prefill for site in first)
    later = watch.sites[3:]
    assert len(later) == 15 and not any(site.prefill for site in later)
    assert [site.rows.tolist() for site in later[::3]] == [[24], [25], [26], [27], [28]]
    assert later[-1].where("answer").sum(1).tolist() == [5, 5]
    assert later[-1].where("image").sum(1).tolist() == [16, 16]


def test_chunked_prefill_is_all_prefill():
    model = models.build("llama")
    inputs = models.inputs("llama", model)
    plain = model.generate(**inputs, **GREEDY)
    with Watch(model) as watch:
        assert torch.equal(model.generate(**inputs, **GREEDY, prefill_chunk_size=3), plain)
    reading = [site.rows.tolist() for site in watch.sites if site.layer == 0 and site.prefill]
    assert reading == [[0, 1, 2], [3, 4, 5], [6, 7]]


@pytest.mark.parametrize("name", ["llama", "qwen2", "llava"])
def test_static_and_given_caches(name):
    model = models.build(name)
    inputs = models.inputs(name, model)
    with Double(model, kind="question"):
        wanted = model.generate(**inputs, **GREEDY)
        static = model.generate(**inputs, **GREEDY, cache_implementation="static")
        assert torch.equal(static, wanted)
        cache = {Steering.of(model).cache_name: StaticCache(model.config.get_text_config(), max_cache_len=64)}
        assert torch.equal(model.generate(**inputs, **GREEDY, **cache), wanted)
    assert not torch.equal(model.generate(**inputs, **GREEDY), wanted)


def test_a_row_alone_and_beside_a_longer_one():
    model = models.build("llava")
    inputs = models.inputs("llava", model)
    with Double(model, factor=3.0):
        both = model.generate(**inputs, **GREEDY)
        before = int((inputs["attention_mask"][1] == 0).sum())
        alone = {name: value[1:] for name, value in inputs.items()}
        for name in ("input_ids", "attention_mask"):
            alone[name] = alone[name][:, before:]
        assert before and torch.equal(model.generate(**alone, **GREEDY)[0, -6:], both[1, -6:])


def test_sampling_and_several_answers_a_prompt():
    model = models.build("llava")
    inputs = models.inputs("llava", model)
    settings = dict(max_new_tokens=5, do_sample=True, num_return_sequences=3, suppress_tokens=[models.IMAGE])
    torch.manual_seed(5)
    plain = model.generate(**inputs, **settings)
    with Watch(model) as watch:
        torch.manual_seed(5)
        assert torch.equal(model.generate(**inputs, **settings), plain)
    assert watch.sites[-1].spans().kinds.shape[0] == 6


def test_everything_is_gone_after_an_exception():
    model = models.build("llava")
    inputs = models.inputs("llava", model)
    plain = model(**inputs).logits
    state, hooks = dict(vars(model)), [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    @dataclass
    class Breaks(Watch):
        def weights(self, site, weights):
            raise RuntimeError("broken")

    method = Breaks(model)
    with pytest.raises(RuntimeError, match="broken"), method:
        model.generate(**inputs, **GREEDY)
    assert method.ended == 1 and vars(model) == state
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert torch.equal(model(**inputs).logits, plain)


def test_a_failing_begin_ends_what_had_begun():
    model = models.build("llama")

    @dataclass
    class Refuses(Watch):
        def begin(self, run):
            raise ValueError("not this prompt")

    with Watch(model) as first, Refuses(model), Watch(model) as third:
        with pytest.raises(ValueError, match="not this prompt"):
            model.generate(**models.inputs("llama", model), **GREEDY)
        assert (first.ended, third.begun, third.ended) == (1, 0, 0)


def test_methods_act_in_the_order_in_which_they_were_entered():
    model = models.build("llama")
    inputs = models.inputs("llama", model)
    order = []

    @dataclass
    class Says(Watch):
        word: str = ""

        def scores(self, site, scores):
            order.append(self.word)
            return scores

    first, second = Says(model, word="a", layers=[0]), Says(model, word="b", layers=[0])
    with first, second:
        model(**inputs)
        with pytest.raises(ValueError, match="already"), first:
            pass
        model(**inputs)
    assert "".join(order) == "abab"


def test_residuals_and_queries():
    model = models.build("qwen2")
    inputs = models.inputs("qwen2", model)

    @dataclass
    class Zero(Method):
        def residual(self, layer, run, states):
            return torch.zeros_like(states)

    @dataclass
    class Still(Method):
        def query(self, site, query):
            return torch.zeros_like(query)

    with torch.no_grad():
        hidden = []
        hook = model.model.layers[1].self_attn.register_forward_hook(lambda *a: hidden.append(a[2][0]))
        with Zero(model, layers=[1]):
            out = model(**inputs).logits
        hook.remove()
        # A stream of zeros has no attention to speak of but biases, equal at every position.
        assert torch.allclose(hidden[0], hidden[0][:, :1].expand_as(hidden[0]), atol=1e-5)
        assert torch.allclose(out, out[:, :1].expand_as(out), atol=1e-4)
        with Still(model), Watch(model) as watch:
            model(**inputs)
    seen = watch.seen[0][0, 0]  # a query of zeros looks at all keys alike
    assert torch.allclose(seen[3, :4], torch.full((4,), 0.25)) and seen[3, 4:].eq(0).all()


def test_what_is_refused():
    model = models.build("llama")
    with pytest.raises(ValueError, match="layers must be numbers from -3 to 2"):
        Watch(model, layers=[3])
    with pytest.raises(ValueError, match="at least one"):
        Watch(model, layers=[])
    with pytest.raises(TypeError, match="PreTrainedModel"):
        Watch(torch.nn.Linear(2, 2))
    from transformers import BertConfig, BertModel

    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(TypeError, match="BertModel has no causal language model"):
        Watch(bert)
    with adapt(model, "sliding(3, 0)"), pytest.raises(ValueError, match="adapted"), Watch(model):
        pass
    assert "_glocal_steering" not in vars(model)
    with Double(model), pytest.raises(ValueError, match="pass spans="):
        model(inputs_embeds=torch.randn(1, 4, 32))
    model.train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with Watch(model), pytest.raises(ValueError, match=r"model\.eval"):
        model(**models.inputs("llama", model))


def test_layer_numbers():
    assert layer_range([-1, 0], 3) == {0, 2}
    assert list(language_layers(models.build("llava"))) == [
        f"model.language_model.layers.{n}.self_attn" for n in range(3)
    ]


def test_nothing_is_kept_between_runs():
    model = models.build("llama")
    inputs = models.inputs("llama", model)
    with Watch(model) as watch:
        model.generate(**inputs, **GREEDY)
        assert Steering.of(model).run is None
        model.generate(input_ids=inputs["input_ids"][:1, :5], **GREEDY)
        assert watch.sites[0].run.prompt == 5 and watch.begun == 2
    assert "generate" not in vars(model)
