"""The two properties that make the model VideoDistill, and the manners of its parts."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from tests.videodistill.tiny import tiny_clip
from videodistill.encoders import load_encoder
from videodistill.model import VideoDistill, VideoDistillConfig
from videodistill.model.layers import FrameGate, LanguageGate, in_full

N, S, M = 12, 16, 7


def tiny_config(**settings) -> VideoDistillConfig:
    sizes = {
        "embed_dim": 24,
        "patch_dim": 32,
        "token_dim": 20,
        "patch_grid": (4, 4),
        "width": 32,
        "heads": 4,
        "frames": N,
        "pick": 4,
        "answers": ["red", "blue", "two"],
    }
    return VideoDistillConfig(**(sizes | settings))


def inputs(videos: int = 2, questions: int = 2, frames: int = N, seed: int = 0) -> dict:
    """Random features of a few questions about each of a few videos."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    rows = videos * questions
    mask = torch.ones(rows, M, dtype=torch.bool)
    mask[::2, M - 3 :] = False
    return {
        "frame_embed": normal(videos, frames, 24),
        "patches": normal(videos, frames, S, 32),
        "text_embed": normal(rows, 24),
        "tokens": normal(rows, M, 20),
        "token_mask": mask,
    }


def trained(config: VideoDistillConfig, seed: int = 0) -> VideoDistill:
    """A model whose zero-initialised parts have left zero, as training leaves them."""
    torch.manual_seed(seed)
    model = VideoDistill(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def gates_of(model: VideoDistill) -> list[torch.nn.Module]:
    """All that the question says to vision, apart from the choice of frames."""
    return [m for m in model.modules() if isinstance(m, (LanguageGate, FrameGate))]


class Pinned:
    """Hooks that record what each gate says, and later say the same again."""

    def __init__(self, model: VideoDistill):
        self.gates = gates_of(model)
        self.said: dict[torch.nn.Module, torch.Tensor] = {}

    def record(self, run):
        return self._with(lambda module, _, output: self.said.__setitem__(module, output), run)

    def replay(self, run):
        return self._with(lambda module, *_: self.said[module], run)

    def _with(self, hook, run):
        handles = [gate.register_forward_hook(hook) for gate in self.gates]
        try:
            return run()
        finally:
            for handle in handles:
                handle.remove()


@pytest.mark.parametrize("gate", ["scalar", "channel"])
def test_language_only_gates_and_chooses(gate):
    """Fixed choice, detached gates: the answer does not depend on the question at all."""
    model = trained(tiny_config(gate=gate))
    batch = inputs()
    language = [batch["tokens"].requires_grad_(), batch["text_embed"].requires_grad_()]
    detach = lambda module, _, output: output.detach()  # noqa: E731
    handles = [gate.register_forward_hook(detach) for gate in gates_of(model)]
    output = model(**batch)  # inference takes the K best: the choice has no gradient
    gradients = torch.autograd.grad(
        output.answer_embed.sum(), language, allow_unused=True, retain_graph=True
    )
    assert gradients == (None, None)
    for handle in handles:
        handle.remove()
    through_gates = torch.autograd.grad(model(**batch).answer_embed.sum(), language)
    for gradient in through_gates:
        assert gradient.abs().max() > 0, "the gates do not see the question: the test is empty"


def test_cross_attention_tells_vision_what_is_asked():
    """The control breaks the property above: chosen frames and gates fixed, words still come in."""
    model = trained(tiny_config(mixing="cross_attention"))
    batch = inputs()
    tokens = batch["tokens"].requires_grad_()
    gates = gates_of(model)
    assert gates and all(isinstance(gate, FrameGate) for gate in gates)
    for gate in gates:
        gate.register_forward_hook(lambda module, _, output: output.detach())
    (gradient,) = torch.autograd.grad(model(**batch).answer_embed.sum(), tokens)
    real = batch["token_mask"]
    assert gradient[real].abs().amax(-1).min() > 0
    assert gradient[~real].eq(0).all()


@pytest.mark.parametrize("sizes", [{}, {"token_dim": 512, "width": 768, "heads": 12}])
def test_cross_attention_has_as_many_parameters(sizes):
    with torch.device("meta"):
        gated, other = (
            sum(p.numel() for p in VideoDistill(tiny_config(**sizes, mixing=mixing)).parameters())
            for mixing in ("gate", "cross_attention")
        )
    assert other == pytest.approx(gated, rel=0.02)


@pytest.mark.parametrize("gate", ["scalar", "channel"])
def test_pinned_gates_leave_nothing_of_the_question(gate):
    """With every gate pinned and the choice fixed, another question leaves the answer bit-equal."""
    model = trained(tiny_config(gate=gate))
    batch = inputs()
    chosen = 1e3 * torch.randn(4, N, generator=torch.Generator().manual_seed(1))
    pinned = Pinned(model)
    with torch.no_grad():
        before = pinned.record(lambda: model(**batch, score_bias=chosen))
        other = batch | {
            "tokens": torch.full_like(batch["tokens"], float("nan")),
            "text_embed": batch["text_embed"].flip(0),
        }
        after = pinned.replay(lambda: model(**other, score_bias=chosen))
        unpinned = model(**batch | {"tokens": batch["tokens"].flip(0)}, score_bias=chosen)
    assert not torch.equal(before.scores, after.scores)
    assert torch.equal(before.sample.indices, after.sample.indices)
    assert torch.equal(before.answer_embed, after.answer_embed)
    assert not torch.equal(before.answer_embed, unpinned.answer_embed), "the gates see nothing"


def test_untrained_answers_as_clip_does(tmp_path):
    """A fresh model scores choices as CLIPModel does on the frames most like the question."""
    from transformers import AutoTokenizer, CLIPModel

    folder = tiny_clip(tmp_path / "clip")
    encoder = load_encoder(folder)
    model = VideoDistill.for_encoder(encoder, width=32, heads=4, pick=3, frames=9).eval()
    frames = torch.randint(0, 256, (9, 32, 32, 3), dtype=torch.uint8)
    question, choices = "what colour is the small circle?", ["red", "a blue square", "yes"]

    features = encoder.encode_frames(frames.numpy())
    asked, offered = encoder.encode_texts([question]), encoder.encode_texts(choices)
    with torch.no_grad():
        output = model(
            features.frame_embed[None],
            features.patches[None],
            asked.text_embed,
            asked.tokens,
            asked.mask,
        )
        ours = model.choice_logits(output.answer_embed, offered.text_embed[None])[0]

    clip, tokenizer = (
        CLIPModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    with torch.no_grad():
        tokens = tokenizer([question, *choices], padding=True, return_tensors="pt")
        theirs = clip(**tokens, pixel_values=encoder.preprocess(frames.numpy()))
        texts = F.normalize(theirs.text_embeds, dim=-1)
        images = F.normalize(theirs.image_embeds, dim=-1)
        best = (images @ texts[0]).topk(3).indices.sort().values
        seen = F.normalize(images[best].mean(0), dim=-1)
        expected = clip.logit_scale.exp() * texts[1:] @ seen
    assert output.sample.indices[0].tolist() == best.tolist()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert ours.argmax() == expected.argmax()


def test_logits_and_scores_keep_their_last_digits_under_autocast() -> None:
    """They are compared, and in bfloat16 alike ones would be equal."""
    model = trained(tiny_config(answers=[str(n) for n in range(40)])).eval()
    width = model.answering.classifier.in_features
    answer, choices = torch.randn(3, width), torch.randn(3, 5, width)
    expected = model.vocabulary_logits(answer), model.choice_logits(answer, choices)
    x = torch.randn(2, 4, model.config.width)
    score = in_full(model.sampler.score, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.vocabulary_logits(answer), model.choice_logits(answer, choices)
        assert torch.equal(in_full(model.sampler.score, x), score)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    model.double()
    assert model.vocabulary_logits(answer.double()).dtype == torch.float64
    assert model.choice_logits(answer.double(), choices.double()).dtype == torch.float64


def test_fresh_answer_is_exactly_the_mean_of_the_chosen_frames():
    torch.manual_seed(0)
    model = VideoDistill(tiny_config()).eval()
    batch = inputs(videos=1, questions=1)
    with torch.no_grad():
        output = model(**batch)
    e = F.normalize(batch["frame_embed"][0], dim=-1)[output.sample.indices[0]]
    assert torch.equal(output.answer_embed[0], e.sum(0) / 4)


def test_save_and_load(tmp_path):
    model = trained(tiny_config(encoder="somewhere", encoder_fingerprint="0123456789abcdef"))
    model.save_pretrained(tmp_path / "head")
    names = {path.name for path in (tmp_path / "head").iterdir()}
    assert {"config.json", "model.safetensors"} <= names
    again = VideoDistill.from_pretrained(tmp_path / "head")
    assert again.config == model.config
    assert dataclasses.asdict(again.config)["answers"] == ["red", "blue", "two"]
    batch = inputs()
    with torch.no_grad():
        assert torch.equal(model(**batch).answer_embed, again.eval()(**batch).answer_embed)


def test_a_checkpoint_of_before_there_were_controls_loads(tmp_path):
    model = trained(tiny_config())
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    older = json.loads(file.read_text())
    for name in ("mixing", "gradient"):
        del older[name]
    file.write_text(json.dumps(older))
    again = VideoDistill.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again.eval()(**inputs()).answer_embed, model(**inputs()).answer_embed)


@pytest.mark.parametrize("mixing", ["gate", "cross_attention"])
def test_questions_share_a_video(mixing):
    """Four questions about two videos: the same as each alone."""
    model = trained(tiny_config(mixing=mixing))
    batch = inputs(videos=2, questions=2)
    with torch.no_grad():
        together = model(**batch)
        for row in range(4):
            video = slice(row // 2, row // 2 + 1)
            alone = model(
                batch["frame_embed"][video],
                batch["patches"][video],
                batch["text_embed"][row : row + 1],
                batch["tokens"][row : row + 1],
                batch["token_mask"][row : row + 1],
            )
            assert torch.equal(alone.sample.indices[0], together.sample.indices[row])
            torch.testing.assert_close(alone.answer_embed[0], together.answer_embed[row])


@pytest.mark.parametrize(
    "settings", [{}, {"mixing": "cross_attention"}, {"frame_choice": "mean"}], ids=str
)
def test_padding_changes_nothing(settings):
    """Masked candidate frames and masked tokens, NaN or not, leave the answer as it is."""
    model = trained(tiny_config(**settings))
    batch = inputs(videos=1, questions=1, frames=6)
    times = (torch.arange(6)[None] + 0.5) / 6
    with torch.no_grad():
        alone = model(**batch, times=times)
        padded = dict(batch)
        for name, filler in (("frame_embed", 7.0), ("patches", 7.0)):
            tail = torch.full_like(batch[name][:, :2], filler)
            padded[name] = torch.cat([batch[name], tail], dim=1)
        padded["tokens"] = batch["tokens"].masked_fill(~batch["token_mask"][..., None], torch.nan)
        mask = torch.arange(8)[None] < 6
        with_padding = model(**padded, frame_mask=mask, times=F.pad(times, (0, 2), value=1.0))
    assert torch.equal(alone.sample.indices, with_padding.sample.indices)
    torch.testing.assert_close(alone.answer_embed, with_padding.answer_embed)


def test_fewer_real_frames_than_slots():
    model = trained(tiny_config())
    batch = inputs(videos=1, questions=1, frames=6)
    mask = torch.tensor([[True, True, False, False, False, False]])
    with torch.no_grad():
        output = model(**batch, frame_mask=mask)
    assert output.sample.slot_mask.tolist() == [[True, True, False, False]]
    assert output.answer_embed.isfinite().all()
    assert output.patch_gates[0, 2:].eq(0).all()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mixing": "cross_attention"},
        {"gradient": "diagonal"},
        {"sampling": "gumbel"},
        {"sampling": "lapsum"},
        {"sampling": "soft"},
    ],
    ids=str,
)
def test_every_parameter_learns(settings):
    """One training step reaches all weights but those behind a zero that has yet to leave zero."""
    torch.manual_seed(0)
    model = trained(tiny_config(**settings)).train()
    output = model(**inputs(), seed=1)
    loss = model.vocabulary_logits(output.answer_embed).logsumexp(-1).sum()
    loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert silent == []


@pytest.mark.parametrize("choice", ["uniform", "random"])
def test_controls_ignore_the_question(choice):
    model = trained(tiny_config(frame_choice=choice))
    batch = inputs()
    torch.manual_seed(3)
    first = model(**batch).sample.indices
    batch["tokens"], batch["text_embed"] = batch["tokens"].flip(0), batch["text_embed"].flip(0)
    torch.manual_seed(3)
    assert torch.equal(first, model(**batch).sample.indices)
    if choice == "uniform":
        assert first[0].tolist() == [1, 4, 7, 10]


def test_mean_of_all_frames_is_a_video_of_that_one_frame():
    """Whatever K; what is asked has no say in it."""
    model = trained(tiny_config(frame_choice="mean"))
    batch = inputs()
    mean = F.normalize(batch["frame_embed"], dim=-1).mean(1, keepdim=True)
    with torch.no_grad():
        output = model(**batch)
        # Its embedding is not of length 1 any more, and is not to be made so again.
        tokens = [batch[name] for name in ("tokens", "token_mask")]
        patches = batch["patches"].mean(1, keepdim=True).repeat_interleave(2, dim=0)
        e = mean.repeat_interleave(2, dim=0)
        half, zero = torch.full((4, 1), 0.5), torch.zeros(4, 1)
        refined = model.refiner(patches, e, half, zero, *tokens, None)
        slots = torch.ones(4, 1, dtype=torch.bool)
        expected = model.answering(e, slots, refined.grains)
        few = model(**batch, pick=1)
    assert output.sample.weights.eq(1 / N).all() and output.sample.weights.shape == (4, 1, N)
    torch.testing.assert_close(output.answer_embed, expected)
    assert torch.equal(output.answer_embed, few.answer_embed)


def test_gradients_of_a_perturbed_choice_differ_in_backward_alone():
    outputs, gradients = [], []
    for gradient in ("exact", "diagonal"):
        model = trained(tiny_config(gradient=gradient)).train()
        output = model(**inputs(), seed=1)
        # Through the choice of frames and nothing else of the sampler.
        weights = (torch.arange(N) * output.sample.weights).sum()
        (found,) = torch.autograd.grad(weights, model.sampler.score.weight)
        outputs.append(output.answer_embed)
        gradients.append(found)
    assert torch.equal(*outputs)
    assert F.cosine_similarity(*gradients).item() < 0.99


@pytest.mark.parametrize("sampling", ["perturbed", "soft"])
def test_other_numbers_of_frames(sampling):
    """A model made for 12 frames takes 3 or 40, and another K."""
    model = trained(tiny_config(sampling=sampling))
    for frames, pick in ((3, 3), (40, 6), (1, 1)):
        with torch.no_grad():
            output = model(**inputs(frames=frames), pick=pick)
            again = model(**inputs(frames=frames), pick=pick)
        assert output.sample.indices.shape == (4, pick)
        assert torch.equal(output.answer_embed, again.answer_embed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 5}, "width 32 is not a multiple of heads 5"),
        ({"width": 36}, "width 36 over heads 4 is odd"),
        ({"gate": "vector"}, "gate must be one of"),
        ({"mixing": "sum"}, "mixing must be one of"),
        ({"gradient": "none"}, "gradient must be one of"),
        ({"merge": 3}, r"merge 3 does not divide patch_grid \(4, 4\)"),
        ({"pick": 0}, "pick must be a positive integer"),
        ({"refiner_blocks": 0}, "refiner_blocks must be a positive integer, not 0"),
        ({"time_prior": -1.0}, "time_prior must be a number of at least 0, not -1.0"),
        ({"sampler_blocks": "2"}, "sampler_blocks must be a positive integer, not '2'"),
        ({"patch_grid": (4,)}, "patch_grid must be two positive integers"),
        ({"patch_grid": (4, 0)}, "patch_grid must be two positive integers"),
        ({"sigma": 0.0}, "sigma must be a positive number, not 0.0"),
        ({"temperature": float("nan")}, "temperature must be a positive number, not nan"),
        ({"logit_scale": "100"}, "logit_scale must be a positive number, not '100'"),
        ({"sampling": "best"}, "sampling must be one of"),
    ],
)
def test_config_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**settings)


def test_merged_patches():
    """Two by two patches make one token: in the right places, with gates for all of them."""
    model = trained(tiny_config(merge=2))
    patches = torch.arange(16.0)[None, None, :, None].expand(1, 1, 16, 32)
    merged = model.refiner._merge(patches)
    assert merged.shape == (1, 1, 4, 128)
    assert merged[0, 0, 1].unflatten(0, (4, 32))[:, 0].tolist() == [2, 3, 6, 7]
    gates = model.refiner._spread(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]))[0, 0].reshape(4, 4)
    assert gates.tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    with torch.no_grad():
        output = model(**inputs())
    assert output.patch_gates.shape == (4, 4, S)


def test_bad_batches_are_refused():
    model = trained(tiny_config())
    batch = inputs(videos=2, questions=2)
    with pytest.raises(ValueError, match="3 questions cannot be shared evenly by 2 videos"):
        model(
            batch["frame_embed"],
            batch["patches"],
            *(batch[name][:3] for name in ("text_embed", "tokens", "token_mask")),
        )
    with pytest.raises(ValueError):
        model(**batch, pick=N + 1)
    with pytest.raises(ValueError, match="no answer vocabulary"):
        trained(tiny_config(answers=[])).vocabulary_logits(torch.zeros(1, 24))
