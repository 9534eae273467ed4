"""Bases that keep more of a text than keys and values, or keep it elsewhere: exact, or refused."""

import json
import logging

import pytest
import torch
import transformers as tf
from peft import LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import save_file

from qadapter import QAdapterModel
from tests.model import tiny_classes
from tests.tiny_models import make_base, perturb

IDS = torch.randint(5, 97, (3, 8), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0
NEW = 8
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": NEW}


def recurrent_gemma(**given):
    """Its recurrent layers keep the state in the modules."""
    config = tf.RecurrentGemmaConfig(
        **SIZES | HEADS | {"num_hidden_layers": 3, "num_key_value_heads": 1},
        lru_width=32, attention_window_size=6, block_types=["recurrent", "attention"], **given,
    )  # fmt: skip
    return tf.RecurrentGemmaForCausalLM(config)


def falcon_h1():
    """Its cache has keys, values and two more states in one layer."""
    config = tf.FalconH1Config(
        **SIZES | HEADS, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1,
        mamba_d_state=8, mamba_chunk_size=8,
    )  # fmt: skip
    return tf.FalconH1ForCausalLM(config)


def jamba():
    """Its layers hand LoRA what is no dense row."""
    config = tf.JambaConfig(
        **SIZES | HEADS, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, num_experts=2, mamba_d_state=8, use_mamba_kernels=False,
    )  # fmt: skip
    return tf.JambaForCausalLM(config)


def mamba():
    """Its forward calls the cache by another name."""
    return tf.MambaForCausalLM(tf.MambaConfig(**SIZES, state_size=8))


def mamba2():
    """Its cache can be compiled, and is no static cache."""
    config = tf.Mamba2Config(**SIZES, num_heads=4, head_dim=16, state_size=8, n_groups=1)
    return tf.Mamba2ForCausalLM(config)


def rwkv():
    """It has no mask, and a state that transformers' caches do not know."""
    return tf.RwkvForCausalLM(tf.RwkvConfig(**SIZES, attention_hidden_size=32))


def roberta():
    """It counts positions from the padding token's id."""
    return tf.RobertaForCausalLM(tf.RobertaConfig(**SIZES | HEADS, is_decoder=True))


def bart():
    """It counts positions whether they are padded or not."""
    config = tf.BartConfig(
        vocab_size=97, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
        init_std=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=64,
        is_decoder=True, is_encoder_decoder=False,
    )  # fmt: skip
    return tf.BartForCausalLM(config)


TARGETS = {
    falcon_h1: ["q_proj", "v_proj"],
    jamba: ["q_proj", "v_proj", "x_proj", "in_proj"],
    mamba: ["in_proj", "x_proj"],
    mamba2: ["in_proj"],
    rwkv: ["key", "value", "receptance"],
    roberta: ["query", "value"],
    recurrent_gemma: ["q_proj", "v_proj", "linear_x", "linear_out"],
    bart: ["q_proj", "v_proj"],
}


def build(kind, **given):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=TARGETS[kind], task_type="CAUSAL_LM")
    return perturb(QAdapterModel.from_base(kind(**given).eval(), lora_config=config), std=0.5)


@torch.no_grad()
def composed(model, ids, strength):
    """Logits behind one row's whole text, each stream by PEFT's own layers."""
    q = model.peft_model(input_ids=ids, use_cache=False).logits[:, -1]
    with model.peft_model.disable_adapter():
        base = model.peft_model(input_ids=ids, use_cache=False).logits[:, -1]
    return strength * q + (1 - strength) * base


def check(model, mask, strength=0.6):
    """Every step's logits in every row, and the same texts where the rows end apart."""
    asked = {"return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
    out = model.generate(IDS, mask, strength=strength, **GREEDY, **asked)
    for row in range(3):
        start = int((mask[row] == 0).sum())
        for step in range(NEW):
            want = composed(model, out.sequences[row : row + 1, start : 8 + step], strength)
            torch.testing.assert_close(
                out.logits[step][row : row + 1], want.float(), rtol=1e-3, atol=2e-3
            )
    free = out.sequences[:, 8:]
    eos = [int(free[1, 1]), int(free[0, 4])]
    got = model.generate(IDS, mask, strength=strength, eos_token_id=eos, **GREEDY)[:, 8:]
    counts = []
    for mine, full in zip(got, free, strict=True):
        counts.append(next((t + 1 for t in range(NEW) if int(full[t]) in eos), NEW))
        width = min(counts[-1], len(mine))
        assert torch.equal(mine[:width], full[:width]) and (mine[width:] == 0).all()
    assert len(set(counts)) > 1, "the rows end together"


@pytest.mark.parametrize("kind", TARGETS, ids=lambda kind: kind.__name__)
def test_texts_are_those_of_whole_passes(kind):
    model = build(kind)
    check(model, torch.ones_like(IDS))
    check(model, torch.ones_like(IDS), strength=1.0)  # one stream alone


@pytest.mark.parametrize("kind", [falcon_h1, jamba, mamba, mamba2], ids=lambda kind: kind.__name__)
def test_left_padding_that_the_base_leaves_out(kind):
    check(build(kind), MASK)


@pytest.mark.parametrize("kind", [recurrent_gemma, rwkv, bart], ids=lambda kind: kind.__name__)
def test_left_padding_that_it_counts_in_is_refused(kind):
    model = build(kind)
    name = type(model.hf_model).__name__
    for strength in (0.0, 0.6):
        with pytest.raises(
            ValueError, match=f"attention_mask: {name} takes no padding on the left"
        ):
            model.generate(IDS, MASK, strength=strength, **GREEDY)


def test_a_state_in_the_modules_takes_whole_passes_and_says_so(caplog):
    model = build(recurrent_gemma)
    with caplog.at_level(logging.WARNING):
        streams = model.streams((None, "default"))
    assert "a cache does not hold all" in streams.uncached
    assert "every token takes a pass of the whole text" in caplog.text
    out = model.generate(IDS, strength=0.6, return_dict_in_generate=True, **GREEDY)
    assert out.past_key_values is None


def test_mamba_decodes_with_its_cache():
    model = build(mamba)
    assert model.streams((None, "default")).uncached is None
    widths = []
    hook = model.hf_model.base_model.layers[0].register_forward_hook(
        lambda module, args, output: widths.append(args[0].shape[1])
    )
    model.generate(IDS, strength=0.6, eos_token_id=None, **GREEDY)
    hook.remove()
    assert widths[-(NEW - 1) :] == [1] * (NEW - 1)


def test_positions_that_are_counted_in_another_way_are_left_to_the_model():
    assert not build(roberta).streams((None, "default")).takes_positions
    assert build(falcon_h1).streams((None, "default")).takes_positions


@pytest.mark.parametrize("kind", ["bert", "xlnet"])
def test_a_base_that_sees_later_tokens_is_refused(kind):
    if kind == "bert":
        base = tf.BertLMHeadModel(tf.BertConfig(**SIZES | HEADS))
        targets = ["query", "value"]
    else:
        base = tf.XLNetLMHeadModel(
            tf.XLNetConfig(vocab_size=97, d_model=32, n_layer=2, n_head=4, d_inner=48)
        )
        targets = ["layer_1"]
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="is no causal model"):
        QAdapterModel.from_base(base.eval(), lora_config=config)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("musicgen", "MusicgenForCausalLM: it has 4 heads, for as many tokens a step"),
        ("gemma4_assistant", r"nothing but token ids fails \(ValueError: inputs_embeds"),
    ],
)
def test_a_base_that_makes_no_text_of_its_own_is_refused(kind, reason):
    with pytest.raises(ValueError, match=reason):
        QAdapterModel.from_base(tiny_classes.make(kind))


def test_logits_that_are_not_those_of_the_tokens_are_refused(monkeypatch):
    """As of a model that fills in a block of tokens behind the text."""
    base = make_base()
    plain = base.forward

    def block(**arguments):
        out = plain(**arguments)
        return type(out)(logits=out.logits.repeat(1, 2, 1))

    monkeypatch.setattr(base, "forward", block)
    with pytest.raises(ValueError, match=r"are \[1, 16, 97\]; expected \[1, 8, vocabulary\]"):
        QAdapterModel.from_base(base)


def test_a_folder_that_transformers_makes_no_causal_lm_of(tmp_path):
    """Its causal LM class is for another config than that of the whole model."""
    tf.MusicgenConfig().save_pretrained(tmp_path)
    save_file({"any": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"transformers makes no causal LM of it \(AttributeError"):
        QAdapterModel.from_pretrained(tmp_path)


def test_a_config_without_the_usual_names():
    """Blt's says nothing of its hidden size and layers, and transformers makes no cache for it."""
    model = perturb(QAdapterModel.from_base(tiny_classes.make("blt")))
    assert "fails" in model.streams((None, "default")).uncached
    ids = torch.randint(5, 97, (1, 9), generator=torch.Generator().manual_seed(0))
    out = model.generate(
        ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, strength=1.0
    )
    with torch.no_grad():
        logits = model.hf_model(input_ids=out, use_cache=False).logits[0]
    assert torch.equal(out[0, 9:], logits[8:-1].argmax(-1))


def test_the_base_has_no_dropout_in_training():
    """BART's layers apply it themselves, in the training mode that checkpointing needs."""
    model = build(bart)
    want = model(IDS)
    model.train()
    got = model(IDS)
    assert torch.equal(got.base_logits, want.base_logits)
    assert torch.equal(got.q_logits, want.q_logits)
    model.gradient_checkpointing_enable()
    assert torch.equal(model(IDS).q_logits, want.q_logits)


@pytest.mark.parametrize("kind", ["lora", "vera"])
def test_the_adapters_own_dropout_acts_in_training_alone(kind):
    targets = ["q_proj", "v_proj"]
    if kind == "lora":
        config = LoraConfig(r=4, lora_dropout=0.5, target_modules=targets)
    else:
        config = VeraConfig(r=4, vera_dropout=0.5, target_modules=targets)
    model = QAdapterModel(get_peft_model(make_base(), config))
    perturb(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vera_lambda" in name:
                parameter.fill_(0.3)
    torch.manual_seed(0)
    still = model(IDS)
    assert torch.equal(model(IDS).q_logits, still.q_logits)
    model.train()
    assert not torch.equal(model(IDS).q_logits, model(IDS).q_logits)
    assert torch.equal(model(IDS).base_logits, still.base_logits)
    model.eval()
    assert torch.equal(model(IDS).q_logits, still.q_logits)


def test_a_base_whose_settings_transformers_refuses(tmp_path, caplog):
    """Its tokens count; what cannot be followed is said, and is no reason not to load it."""
    base = make_base()
    base.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 5], "num_return_sequences": 3}))
    with pytest.raises(ValueError, match="num_return_sequences"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = QAdapterModel.from_pretrained(tmp_path / "base")
    assert model.generation_config.eos_token_id == [2, 5]
    assert "only its special tokens count" in caplog.text
    assert len(model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)) == len(IDS)
