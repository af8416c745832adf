"""Kernels by group: real names of cuDNN, cuBLAS, CUTLASS, ATen and torch's compiler; and their shares of the time."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.gpu_step.kernels import GAPS, GROUPS, Kernel, busy_us, kernel_group, shares, top
from benchmarks.gpu_step.profiling import device_kernels

_MULTI_TENSOR = "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
_COPY = (
    "at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}::operator()() const::{lambda()#7}::"
    "operator()() const::{lambda(float)#1}"
)
NAMES = {
    "convolution": [
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1_"
        "execute_segment_k_off_kernel__5x_cudnn",
        "sm90_xmma_dgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize64x64x64_kernel__5x_cudnn",
        "sm80_xmma_wgrad_implicit_gemm_indexed_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x32x64_stage4_warpsize2x1x1_"
        "g1_tensor16x8x16_execute_kernel__5x_cudnn",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized_bf16_128x128_32x4_nhwc_unity_stride"
        "_align8>(cutlass_tensorop_bf16_s16816dgrad_optimized_bf16_128x128_32x4_nhwc_unity_stride_align8::Params)",
        "void cutlass_cudnn::Kernel<cutlass_tensorop_f16_s16816fprop_optimized_f16_128x128_32x5_nhwc_align8>(...)",
        "_5x_cudnn_ampere_scudnn_winograd_128x128_ldg1_ldg4_relu_tile148t_nt_v1",
        "void implicit_convolve_sgemm<float, float, 1024, 5, 5, 3, 3, 3, 1, false, false, true>(int, int, int, ...)",
        "void cudnn::cnn::conv2d_grouped_direct_kernel<false, true, false, false, 0, 0, int, float, float, float>(...)",
        "void cudnn::cnn::wgrad2d_grouped_direct_kernel<__nv_bfloat16, float, float, 3, 3>(...)",
        "void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<3, c10::BFloat16, int>(...)",
        "triton_tem_fused_convolution_relu_7",
        "aten::mkldnn_convolution",
        "aten::convolution_backward",
    ],
    "matrix product": [
        "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT",
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN",
        "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_nt",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__"
        "5x_cublas",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>(...)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, false, true>(...)",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4, 4>(...)",
        "triton_tem_fused_addmm_gelu_3",
        "aten::addmm",
        "aten::mm",
    ],
    "attention": [
        "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 128, 4>>(...)",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<pytorch_flash::Flash_bwd_kernel_traits>",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_cga1x1x1_kernel0_0",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ],
    "norm": [
        "void cudnn::batchnorm_fwtr_nhwc_semiPersist<__nv_bfloat16, float, float, 512, true, 1, 1, 1>(...)",
        "void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, 512, true, 1, true>(...)",
        "void cudnn::bn_bw_1C11_kernel_new<float, float, float2, 512, true, 1>(...)",
        "void at::native::batch_norm_transform_input_channels_last_kernel<c10::BFloat16, c10::BFloat16, float, 4>(...)",
        "void at::native::batch_norm_backward_reduce_channels_last_kernel<4, c10::BFloat16, float, float>(...)",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, false>(...)",
        "void at::native::(anonymous namespace)::layer_norm_grad_input_kernel_vectorized<c10::BFloat16, float>(...)",
        "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float, float, 64, 1, 64>(...)",
        "triton_poi_fused__native_batch_norm_legit_functional_relu_3",
        "triton_red_fused__native_batch_norm_legit_functional_5",
        "triton_red_fused_native_batch_norm_backward_threshold_backward_23",
        "triton_per_fused_add_native_layer_norm_12",
        "aten::native_batch_norm_backward",
    ],
    "elementwise": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>, ...>(...)",
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::(anonymous "
        "namespace)::threshold_kernel_impl<c10::BFloat16>>(...)",
        "void at::native::vectorized_elementwise_kernel<8, at::native::GeluCUDAKernelImpl(at::TensorIteratorBase&)>",
        "void at::native::index_elementwise_kernel<128, 4, at::native::gpu_index_kernel<...>>(...)",
        "triton_poi_fused_add_relu_11",
        "triton_poi_fused_gelu_gelu_backward_4",
        "aten::silu_backward",
        "aten::threshold_backward",
    ],
    "copies and formats": [
        "void cudnn::ops::nchwToNhwcKernel<__half, __half, float, false, true, (cudnnKernelDataType_t)0>(...)",
        "void cudnn::engines_precompiled::nhwcToNchwKernel<__half, __half, float, true, false>",
        "void nhwcAddPaddingKernel<__nv_bfloat16, __nv_bfloat16, float, true, (cudnnKernelDataType_t)9>(...)",
        f"void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<{_COPY}>(...)",
        "void at::native::unrolled_elementwise_kernel<at::native::bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_aligned16_contig<...>(...)",
        "Memcpy DtoD (Device -> Device)",
        "Memcpy HtoD (Pinned -> Device)",
        "Memset (Device)",
        "triton_poi_fused__to_copy_0",
        "triton_poi_fused__to_copy_convolution_1",
        "triton_poi_fused_convolution_backward_44",
        "triton_poi_fused_clone_permute_2",
        "aten::copy_",
        "aten::_to_copy",
    ],
    "optimizer": [
        f"{_MULTI_TENSOR}TensorListMetadata<2>, at::native::(anonymous namespace)::BinaryOpListAlphaFunctor<float, 2>>",
        f"{_MULTI_TENSOR}FusedOptimizerTensorListMetadata<2>, at::native::(anonymous namespace)::FusedSgdMathFunctor>",
        "triton_for_fused_0",
        "aten::_foreach_add_",
        "Optimizer.step#SGD.step",
    ],
    "others": [
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float>>>(...)",
        "void at::native::(anonymous namespace)::max_pool_forward_nhwc<c10::BFloat16, int>(...)",
        "void (anonymous namespace)::softmax_warp_forward<float, float, float, 10, true, false>(...)",
        "void at::native::(anonymous namespace)::nll_loss_forward_reduce_cuda_kernel_2d<float, float, long>(...)",
        "triton_poi_fused_max_pool2d_with_indices_5",
        "triton_per_fused__log_softmax_nll_loss_forward_60",
        "triton_red_fused_convolution_backward_sum_8",
        "aten::empty_strided",
        "TorchDynamo Cache Lookup",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, names in NAMES.items() for name in names])
def test_a_kernel_belongs_to_its_group(group: str, name: str) -> None:
    assert kernel_group(name) == group


def test_every_group_has_names() -> None:
    assert set(NAMES) == set(GROUPS)


def test_shares_with_gaps_and_kernels_that_overlap() -> None:
    kernels = [
        Kernel("aten::mm", 30.0, 0.0),
        Kernel("Memset (Device)", 20.0, 20.0),  # 10 of it beside the product
        Kernel("aten::mm", 10.0, 80.0),
    ]
    assert busy_us(kernels) == 50.0
    rows = {row["group"]: row for row in shares(kernels, span_us=100.0)}
    assert list(rows)[:2] == ["matrix product", "copies and formats"]
    assert (rows["matrix product"]["us"], rows["matrix product"]["count"]) == (40.0, 2)
    assert rows["copies and formats"]["share"] == 0.2
    assert rows[GAPS]["share"] == 0.5
    assert set(rows) == {*GROUPS, GAPS}


def test_shares_of_sums_without_a_place_in_time_add_up() -> None:
    rows = shares([Kernel("aten::mm", 60.0, count=3), Kernel("aten::copy_", 15.0)], span_us=100.0)
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)
    assert rows[-1] == {"group": GAPS, "us": 25.0, "share": 0.25, "count": 0}


def test_the_longest_kernels_by_name() -> None:
    kernels = [Kernel("a", 1.0), Kernel("b", 5.0), Kernel("a", 2.0), Kernel("c", 4.0)]
    first, second = top(kernels, number=2, span_us=10.0)
    assert (first["name"], first["us"], first["share"]) == ("b", 5.0, 0.5)
    assert second["name"] == "c"
    assert top(kernels, number=9, span_us=10.0)[2] == {
        "name": "a",
        "group": "others",
        "us": 3.0,
        "share": 0.3,
        "count": 2,
    }


def test_only_what_ran_on_the_device_is_taken_from_a_trace() -> None:
    def event(name: str, cat: str, **more: Any) -> dict[str, Any]:
        return {"ph": "X", "name": name, "cat": cat, "ts": 10.5, "dur": 2.5, **more}

    trace = {
        "traceEvents": [
            event("triton_poi_fused_add_0", "kernel", args={"stream": 7}),
            event("Memcpy DtoD (Device -> Device)", "gpu_memcpy"),
            event("Memset (Device)", "gpu_memset"),
            event("cudaLaunchKernel", "cuda_runtime"),
            event("Optimizer.step#SGD.step", "gpu_user_annotation"),
            event("aten::mm", "cpu_op"),
            {"ph": "M", "name": "process_name"},
            {"ph": "s", "name": "ac2g", "cat": "ac2g", "ts": 1},
        ]
    }
    found = device_kernels(trace)
    assert [kernel.name for kernel in found] == [
        "triton_poi_fused_add_0", "Memcpy DtoD (Device -> Device)", "Memset (Device)",
    ]  # fmt: skip
    assert (found[0].start_us, found[0].duration_us) == (10.5, 2.5)
