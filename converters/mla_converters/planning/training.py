"""What it takes to train a converted model with ``vllm-mla heal``."""

import copy
import time

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from mla_converters.checkpoints.shape import PlannedSource, Shape
from mla_converters.latent.cache_size import CacheBudget
from mla_converters.latent.maps import has_query_map
from mla_converters.methods.cost import written_bytes
from mla_converters.options import HealOptions, PlanTraining
from mla_converters.planning.layouts import Candidate
from mla_converters.reports.plan import PlannedTraining
from mla_converters.support.devices import native_bfloat16, usable_device
from mla_converters.training.checkpoints import BYTES
from mla_converters.training.losses import CHUNK, Weights, WholeVocabulary, prediction_loss
from mla_converters.training.teachers import ATTENTION
from mla_converters.training.writing import SAVES, TOKEN_BYTES

WEIGHT = 2  # bytes of a weight that is not trained, in bfloat16
TRAINED = 16  # bytes of one that is: weight, gradient and two moments, in float32
LOGITS = 4 * 6  # bytes per position and word of the vocabulary that exist for one chunk of the loss
HIDDEN, INNER, HEADS = 16, 8, 12  # bytes kept per token and layer, for each number of these widths
DEVICE = 10**9  # bytes that torch, its kernels and the buffers of communication take
LORA_RANK: int = HealOptions.model_fields["lora_rank"].default
UTILISATION = 0.4  # share of a device's peak that training reaches
TIMED = 3  # steps of which the fastest counts


def planned_training(source: PlannedSource, chosen: Candidate, options: PlanTraining) -> PlannedTraining:
    """Memory, disk and time of training the recommended conversion on its source's predictions.

    Sharded over N devices, each device has one N-th of the weights, and beside that the output head whole, and two
    layers. A device keeps for each token and layer what the backward pass needs: about 16 bytes for each
    number of the hidden state, 8 for each of the MLP's width, and 12 for each of the heads' queries.

    A token takes 2 floating-point operations per weight for the teacher's forward pass and as many for the student's;
    2 for the gradients of what layers get, 2 for each trained weight, and 2 where layers are computed twice.

    Args:
        source: the model to convert.
        chosen: its conversion.
        options: devices, tokens, what is trained.
    """
    shape, budget = source.shape, chosen.cache.budget
    attention = shape.layers * shape.attention_parameters
    converted = written_bytes(shape, budget, chosen.nope_dim) // shape.weight_bytes
    own_attention = converted - (shape.parameters - attention)
    trained, frozen = own_attention, 0  # frozen weights are those of the converted attentions that do not change
    if options.train == "all":
        trained = converted
    elif options.train == "lora":
        changes, maps = low_rank_changes(shape, budget, chosen.nope_dim)
        trained, frozen = shape.layers * (changes + maps), own_attention - shape.layers * maps
    # The source has all that is outside the converted attentions and not trained, or it teaches.
    weights = TRAINED * trained + WEIGHT * (shape.parameters + frozen)
    ends = _ends(shape)
    head = shape.embedding_parameters
    gathered = WEIGHT * (head + 2 * (shape.parameters - ends + own_attention) // shape.layers)
    vocabulary = head // shape.hidden
    queries = shape.query_heads * (chosen.nope_dim + budget.qk_rope_head_dim)
    layer = HIDDEN * shape.hidden + INNER * shape.mlp_width + HEADS * queries
    kept = layer + WEIGHT * shape.layers * shape.hidden if options.gradient_checkpointing else layer * shape.layers
    windows = options.device_batch_size * options.length
    working = windows * kept + LOGITS * CHUNK * vocabulary + DEVICE
    used = shape.layers * shape.layer_parameters + shape.embedding_parameters
    changed = used if options.train == "all" else trained
    operations = 2 * used * (3 + options.gradient_checkpointing) + 2 * changed
    speed = (
        measured_speed(source, options) if options.measure else UTILISATION * options.device_tflops * 1e12 / operations
    )
    return PlannedTraining(
        train=options.train,
        devices=options.devices,
        tokens=options.tokens,
        trained_parameters=trained,
        memory_bytes=weights + working,
        sharded_memory_bytes=weights // options.devices + gathered + working,
        disk_bytes=converted * shape.weight_bytes + SAVES * BYTES * trained + TOKEN_BYTES * options.tokens,
        tokens_per_second_and_device=round(speed, 1),
        measured=options.measure,
        hours=round(options.tokens / (speed * options.devices) / 3600, 2),
    )


def low_rank_changes(shape: Shape, budget: CacheBudget, nope_dim: int) -> tuple[int, int]:
    """Weights that ``--train lora`` trains in a layer: low-rank changes, and the maps to rotary queries.

    The change of a matrix has its rank times the matrix's rows and columns. The maps are small and trained whole.

    Args:
        shape: the source's shape.
        budget: the cache's sizes.
        nope_dim: ``qk_nope_head_dim`` of the converted model.
    """
    latent, rope, head_dim, hidden = budget.kv_lora_rank, budget.qk_rope_head_dim, shape.head_dim, shape.hidden
    mapped = has_query_map(head_dim, hidden, rope, nope_dim, shape.qk_norm)
    query = head_dim if mapped else (head_dim if shape.qk_norm else nope_dim) + rope
    keys = shape.kv_heads * head_dim if shape.qk_norm else 0  # cached numbers are then made from the keys, too
    matrices = [
        (shape.query_heads * query, hidden),
        (latent + rope, keys + hidden),
        (shape.query_heads * (nope_dim + head_dim), latent),
        (hidden, shape.query_heads * head_dim),
    ]
    if keys:
        matrices.append((keys, hidden))
    return LORA_RANK * sum(map(sum, matrices)), shape.query_heads * head_dim * rope if mapped else 0


def _ends(shape: Shape) -> int:
    """Parameters outside the layers. Mixtures of experts, whose layers are counted in part, count as not tied."""
    if shape.mlp_width == 0:
        return 2 * shape.embedding_parameters
    return shape.parameters - shape.layers * shape.layer_parameters


def measured_speed(source: PlannedSource, options: PlanTraining) -> float:
    """Tokens per second of this machine, from models with one layer and with two, whose weights are random.

    They have the source's attention, whose products are about as many as those of its conversion.

    Raises:
        OptionError: there is no such device.
    """
    device = usable_device(options.device)
    dtype = torch.bfloat16 if native_bfloat16(device) else torch.float32
    one, two = (_step_seconds(source.config, layers, options, device, dtype) for layers in (1, 2))
    step = one + (source.shape.layers - 1) * max(two - one, 0.0)
    return options.device_batch_size * options.length / step


def _step_seconds(
    config: PretrainedConfig, layers: int, options: PlanTraining, device: str, dtype: torch.dtype
) -> float:
    """Seconds of one step with one layer or more: the fastest of some."""
    small = copy.deepcopy(config)
    small.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(small, dtype=dtype).to(device).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(options.train == "all" or ATTENTION in name)
    ids = torch.randint(0, config.vocab_size, (options.device_batch_size, options.length), device=device)
    seconds = []
    for _ in range(TIMED):
        started = time.perf_counter()
        with torch.no_grad():
            expected = model.model(input_ids=ids, use_cache=False).last_hidden_state
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        teaching = WholeVocabulary(expected.flatten(0, 1), model.lm_head.weight)
        loss, _ = prediction_loss(hidden, model.lm_head.weight, ids, teaching, Weights())
        loss.backward()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return min(seconds)
