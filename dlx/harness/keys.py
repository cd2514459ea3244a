"""The field's keys: what each key of an `engine:` or `eval:` section is in dlx, or why it is nothing.

The field is Diffulex, whose run files are the ones in use. Run files are read by this table, and docs/keys.md shows
it; `dlx.harness.files` does what it says.
"""

from __future__ import annotations

from typing import Any, NamedTuple

ANY: tuple[Any, ...] = ()


class Key(NamedTuple):
    """What one key is.

    group  heading in the docs
    to     field of dlx that takes it, as Class.field; several by commas; empty: none
    why    what is done with the value; without a field, why there is none
    only   without a field: values that ask for what dlx does anyway, others are refused; ANY: all are accepted
    """

    group: str
    to: str
    why: str
    only: tuple[Any, ...] = ANY


def _keys(group: str, **keys: tuple[str, str] | tuple[str, str, tuple[Any, ...]]) -> dict[str, Key]:
    return {name: Key(group, said[0], said[1], said[2] if len(said) == 3 else ANY) for name, said in keys.items()}


ENGINE: dict[str, Key] = {
    **_keys(
        "Model",
        model=("Config.model", "a checkpoint folder, or ORG/NAME"),
        model_path=("Config.model", "as `model`; `tiny` is the bundled model"),
        tokenizer_path=("", "it is read beside the weights, so that both fit; leave it out, or repeat model_path"),
        model_name=("", "the family is read from config.json; a name of another family is refused"),
        hf_config=("", "config.json of the checkpoint is read, nothing else", (None,)),
        tokenizer_vocab_size=("", "counted from the tokenizer; ids beyond it are never proposed", (None,)),
        eos=("SamplingParams.stop_token_ids", "beside the ids of generation_config.json; -1 is those alone"),
        mask_token_id=("", "a fact of the family; another id is refused (151666, the default there, is none)"),
        use_lora=("", "`lora_path` says it; true without a path is refused"),
        lora_path=("Config.lora", "merged into the weights as they are read"),
        pre_merge_lora=("", "one adapter is always merged; several stay apart with Config.adapters"),
    ),
    **_keys(
        "Decoding",
        decoding_strategy=("Config.policy", "by name; block_diffusion, multi_block_diffusion, fast_dllm are multi_bd"),
        block_size=("Config.block_length", "as it was trained; of fast_dllm_v2 a sub-block, buffer_size a block"),
        buffer_size=("Policy.N", "blocks that decode at once; there the one being stored counts, here it does not"),
        multi_block_prefix_full=("Policy.full", "the strategy says it, there as here, so the key changes nothing"),
        sampling_mode=("Policy.rewrite", "naive keeps decided tokens; edit with multi_bd is the policy `edit`"),
        max_post_edit_steps=("Calm.limit", "forwards of a block without masks; needs a policy that edits"),
        penalty_lambda=("", "no rule lowers logits of what stands before; a Policy.score of your own may", (0, 0.0)),
        enable_vectorized_sampler=("", "the sampler is one kernel for all rows, always"),
        enable_vectorized_sampler_compile=("", "it is compiled with the step"),
        auto_max_nfe_warmup_steps=("Policy.auto_max_nfe", "on if the key is there; there it is always on"),
        auto_max_nfe_tpf_floor=("", "the formula's floor is 1", (1, 1.0)),
        fdv2_use_block_cache=("Config.policy", "true: fast_dllm_v2_cached; false: fast_dllm_v2"),
    ),
    **_keys(
        "Thresholds",
        decoding_thresholds=("SamplingParams.threshold", "a mapping of the keys below, without `_threshold`"),
        add_block_threshold=("SamplingParams.open_at", ""),
        semi_complete_threshold=("SamplingParams.force_at", ""),
        accept_threshold=("SamplingParams.threshold", "strict `>`"),
        edit_threshold=("SamplingParams.edit", "of policies that edit; there it never arrives, and 0 holds"),
        remask_threshold=("SamplingParams.remask", "of policies that remask; no effect there, refused here"),
        token_stability_threshold=("SamplingParams.stability", "of policies that edit; 0 alone elsewhere"),
    ),
    **_keys(
        "DMax and token merge",
        token_merge_mode=("Policy.embed", "dmax_topk: Merge; iter_smooth_topk: Smooth, the policy `token_merge`"),
        token_merge_top_k=("Smooth.k", "of iter_smooth_topk; dmax_topk mixes one token and the mask, so 1"),
        token_merge_renormalize=("Merge.renormalise", "of dmax_topk; iter_smooth_topk has no norm to keep"),
        token_merge_weight=("Smooth.weight", "of iter_smooth_topk; of dmax_topk 1, or 0, which is Policy.embed=Hard()"),
        dmax_sampler_fast_path=("", "confidences of decided tokens are computed, not taken for 1; see differences.md"),
        dmax_force_prefill_active=("", "there is no second path that decodes"),
    ),
    **_keys(
        "DiffusionGemma",
        diffusion_gemma_max_denoising_steps=("Canvas.steps", ""),
        diffusion_gemma_stability_threshold=("Stable.forwards", "less one: 2 equal canvases are 1 without change"),
        diffusion_gemma_t_min=("Canvas.cold", "above 0"),
        diffusion_gemma_t_max=("Canvas.hot", ""),
        diffusion_gemma_confidence_threshold=("Stable.below", ""),
        diffusion_gemma_entropy_bound=("SamplingParams.threshold", "from 0 to 1: the policy accepts by it"),
    ),
    **_keys(
        "Mixtures of experts",
        moe_dispatcher_backend=("", "experts are on one GPU, so nothing is sent", ("standard",)),
        moe_gemm_impl=("", "one grouped matmul (dlx/ops/moe), and its plain reference on a CPU"),
        deepep_mode=("", "as moe_dispatcher_backend; nothing reads it there either"),
        deepep_num_max_dispatch_tokens_per_rank=("", "as deepep_mode"),
        expert_parallel_size=("", "dlx decodes on one GPU", (1,)),
    ),
    **_keys(
        "Sizes and memory",
        max_num_batched_tokens=("Config.max_num_batched_tokens", "a prompt of more takes several launches"),
        max_num_reqs=("Config.max_num_seqs", ""),
        max_model_len=("Config.max_model_len", "more than the model's positions is refused, not clamped"),
        gpu_memory_utilization=("Config.gpu_memory_utilization", ""),
        page_size=("Config.page_size", "a multiple of the block length"),
        num_pages=("Config.num_pages", "-1 is what rows and memory allow"),
        enable_prefix_caching=("Config.prefix_caching", ""),
        kv_cache_layout=("", "one layout, which the attention kernel wants", ("unified",)),
        k_cache_hdim_split_factor_x=("", "of the distinct layout alone"),
    ),
    **_keys(
        "Distribution",
        data_parallel_size=("", "start a process a GPU", (1,)),
        tensor_parallel_size=("", "dlx decodes on one GPU; their default is 2 in Python", (1,)),
        master_addr=("", "there are no ranks that would meet"),
        master_port=("", "as master_addr"),
        distributed_backend=("", "as master_addr"),
        distributed_timeout_seconds=("", "as master_addr"),
        shm_name=("", "no process is sent requests"),
        device_start=("Config.device", "N is cuda:N, where there is CUDA"),
        device_ids=("Config.device", "one: [N] is cuda:N; [] takes the first; several are refused"),
    ),
    **_keys(
        "Runtime",
        skip_warmup=("", "a graph is made when it is first needed; `dlx pack` makes them beforehand"),
        enforce_eager=("Config.graphs", "true is off"),
        attn_impl=("", "one kernel; `naive` ignores the cache and request borders there, so it is refused",
            ("triton_grouped", "triton")),
        enable_full_static_runner=("Config.graphs", "false is off"),
        enable_prefill_cudagraph=("", "a prefill is captured wherever a step is; no effect there"),
        prefill_cudagraph_max_len=("", "as enable_prefill_cudagraph"),
        enable_torch_compile=("", "what is captured is compiled; Config.graphs chooses"),
        enable_cudagraph_torch_compile=("", "as enable_torch_compile"),
        torch_compile_mode=("", "as enable_torch_compile; no effect there"),
        enable_vllm_layers=("", "norm, SwiGLU and rotary are dlx's own, in fused kernels"),
    ),
    **_keys(
        "Profiler",
        profiler_config=("", "an evaluation is not profiled; use `dlx profile`, or dlx.profile in Python", (None,)),
    ),
}  # fmt: skip

SAMPLING: dict[str, Key] = _keys(
    "Sampling",
    temperature=("SamplingParams.temperature", "0 where nothing is said; there 1"),
    max_tokens=("SamplingParams.max_tokens", "decided tokens, masks not counted"),
    max_nfe=("SamplingParams.max_nfe", "denoise forwards; there the prefill counts as one"),
    max_repetition_run=("Policy.max_repetition_run", "from 2 on"),
    ignore_eos=("SamplingParams.ignore_eos", ""),
)

EVAL: dict[str, Key] = SAMPLING | _keys(
    "Evaluation",
    dataset_name=("Options.tasks", "one or several by commas: `tiny`, gsm8k, humaneval, or a task of lm-eval's"),
    dataset_limit=("Options.limit", "prompts of each task"),
    include_path=("Options.include_path", "a folder of lm-eval's task files; their Python code runs"),
    output_dir=("Options.out", "results.json, and samples.jsonl with save_results"),
    save_results=("Options.save_results", ""),
    confirm_run_unsafe_code=(
        "Options.confirm_run_unsafe_code",
        "programs of the model may be run (humaneval)",
    ),
    data=("Options.data", "dlx's own: {gsm8k: FILE, humaneval: FILE}"),
    chat=("Options.chat", "dlx's own: whether prompts go through the chat template"),
    seed=("SamplingParams.seed", "dlx's own: key of the draws of the first request; the next has the next"),
)

PROFILER: dict[str, Key] = _keys(
    "Profiler",
    profiler=("Profile.tool", "torch; cuda tells nsys or ncu what to record"),
    torch_profiler_dir=("Profile.out", ""),
    delay_iterations=("Profile.start", "steps that run before"),
    max_iterations=("Profile.steps", ""),
    run_id=("Profile.out", "a folder a run"),
    record_shapes=("", "shapes are static: the policy, the buckets and the card say them; both are in the table"),
    profile_memory=("", "no step allocates; `tools/bench.py latency` tells the peak"),
    with_stack=("", "a captured step has no host behind it; verbs are told apart with graphs=\"off\""),
    with_modules=("", "as with_stack: ranges are named by verb"),
    use_cuda=("", "recorded where the engine runs on CUDA"),
)  # fmt: skip

# the field's names of families → dlx's
FAMILIES = {
    "dream": ("dream",),
    "diffucoder": ("diffucoder", "dream"),
    "dream_reasoner": ("dream_reasoner",),
    "stable_diffcoder": ("stable_diffcoder",),
    "llada": ("llada",),
    "fast_dllm_v2": ("fast_dllm_v2",),
    "sdar": ("sdar",),
    "sdar_moe": ("sdar_moe",),
    "llada2": ("llada2",),
    "llada2_moe": ("llada2",),
    "llada2_mini": ("llada2",),
    "llada2dot1_mini": ("llada2",),
    "llada2_mini_dmax": ("llada2",),
    "diffusion_gemma": ("diffusion_gemma",),
}
