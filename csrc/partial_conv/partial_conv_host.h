// SPDX-License-Identifier: Apache-2.0
// Partial convolution on either device: zeroed sources, the vendor's convolution, one pass over the output. Included
// once for each device, after FUSED_INPAINT_DEVICE names the namespace of its passes. Defined there before:
// kMatrixUnits, whether the vendor's convolution wants channels by eights; convolution and convolution_backward; and
// suits_plain_weight, whether a convolution is quicker by the weight as it is than by a packed one.
#pragma once

#include <array>
#include <initializer_list>

#include "common/dispatch.h"
#include "partial_conv/partial_conv.h"

namespace fused_inpaint::FUSED_INPAINT_DEVICE {
namespace {

// Memory safety only: what a user can get wrong is said in Python, in better words.
void check(const std::vector<Tensor>& sources, const std::vector<Tensor>& masks, const Tensor& count,
           const Tensor& weight, const Ints& upsample, int64_t groups, const Ints& zeroed) {
  const size_t n = sources.size();
  STD_TORCH_CHECK(
      n > 0 && masks.size() == n && upsample.size() == n && zeroed.size() == n && weight.dim() == 4,
      "partial_conv2d: sources, masks, upsample and zeroed must be of one length, and weight of 4 dimensions");
  for (size_t i = 0; i < n; ++i) {
    const Tensor &x = sources[i], &m = masks[i];
    STD_TORCH_CHECK(
        x.dim() == 4 && x.scalar_type() == sources[0].scalar_type() && (upsample[i] == 1 || upsample[i] == 2),
        "partial_conv2d: sources must be (N, C, H, W) of one dtype, upsampled by 1 or 2");
    STD_TORCH_CHECK(x.size(0) == sources[0].size(0) && x.size(2) * upsample[i] == sources[0].size(2) * upsample[0] &&
                        x.size(3) * upsample[i] == sources[0].size(3) * upsample[0],
                    "partial_conv2d: sources must be of one size after upsampling");
    STD_TORCH_CHECK(m.dim() == 4 && m.scalar_type() == ScalarType::Byte && m.is_contiguous() &&
                        m.device() == weight.device() && m.size(2) == x.size(2) && m.size(3) == x.size(3) &&
                        (m.size(0) == 1 || m.size(0) == x.size(0)) && (m.size(1) == 1 || m.size(1) == x.size(1)),
                    "partial_conv2d: a mask must be contiguous uint8 of its source's size");
  }
  STD_TORCH_CHECK(count.dim() == 4 && count.scalar_type() == ScalarType::Int && count.is_contiguous() &&
                      count.device() == weight.device() && count.size(1) == 1 &&
                      (count.size(0) == 1 || count.size(0) == sources[0].size(0)),
                  "partial_conv2d: count must be contiguous int32 (N or 1, 1, H', W')");
  int64_t channels = 0;
  for (const Tensor& x : sources) channels += x.size(1);
  STD_TORCH_CHECK(channels > 0 && channels == weight.size(1) * groups && weight.size(2) > 0 && weight.size(3) > 0,
                  "partial_conv2d: weight must have the sources' channels and at least one tap");
}

// Parameters and statistics have one value for each output channel.
void check_channels(std::initializer_list<const Tensor*> tensors, int64_t outputs) {
  for (const Tensor* t : tensors)
    STD_TORCH_CHECK(!t || (t->numel() == outputs && t->is_contiguous()),
                    "partial_conv2d: scale, bias, norm and statistics must be contiguous with ", outputs, " values");
}

void check_map(const char* name, const Tensor& map, const std::vector<int64_t>& size, ScalarType dtype) {
  bool fits = map.dim() == 4 && map.scalar_type() == dtype;
  for (int d = 0; fits && d < 4; ++d) fits = map.size(d) == size[d];
  STD_TORCH_CHECK(fits, "partial_conv2d: ", name,
                  " must have the size and dtype that the masks' counts give the output");
}

// The inputs of the convolutions whose sum is the numerator. Unfolded: one convolution of the concatenated sources.
// Folded: one for each source, at its own resolution.
struct Operands {
  std::vector<Tensor> x, weight;
  std::vector<bool> folded;
  std::vector<ConvGeometry> geometry;
  std::vector<std::optional<PixelBlocks>> blocks;
  bool packed = false;  // the weights
  void add(const Tensor& source, const Tensor& filters, bool low, const ConvGeometry& how,
           const std::optional<PixelBlocks>& in_blocks = std::nullopt) {
    x.push_back(source), weight.push_back(filters), folded.push_back(low), geometry.push_back(how);
    blocks.push_back(in_blocks);
  }
};

// Outputs of each phase. A GPU's matrix units want a multiple of 8 in all.
int64_t phase_outputs(int64_t outputs, ScalarType dtype) {
  return kMatrixUnits && is_half(dtype) ? outputs + outputs % 2 : outputs;
}

// Whether there is an upsampled source and the maps are large enough to fold it; decided here, not in Python, so that a
// graph compiled for dynamic shapes does not depend on it.
bool folds(const std::vector<Tensor>& sources, const Ints& upsample, const Tensor& weight, int64_t fold_from) {
  for (size_t i = 0; i < sources.size(); ++i)
    if (upsample[i] == 2) {
      STD_TORCH_CHECK(weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1,
                      "partial_conv2d: the kernel of an upsampled source must be odd and square");
      return sources[i].size(0) * sources[i].size(2) * sources[i].size(3) >= fold_from;
    }
  return false;
}

// A source with its holes at 0. `zeroed` is the caller's promise that they are, which saves looking and copying.
Tensor zero_filled(const Tensor& x, const Tensor& mask, int64_t zeroed) {
  return zeroed ? channels_last(x) : select_valid(x, mask);
}

// How a source is taken in blocks, if that is what the matrix units want. `phases`: it stands beside an upsampled one.
std::optional<PixelBlocks> blocks_of(const Tensor& x, const Tensor& weight, const ConvGeometry& g, bool phases) {
  const int64_t stride = phases ? 1 : 2;
  if (!kMatrixUnits || x.size(1) > 4 || !is_half(x.scalar_type()) || g.groups != 1) return std::nullopt;
  PixelBlocks b{};
  b.channels = x.size(1);
  b.phases = phases;
  for (int d = 0; d < 2; ++d) {
    const int64_t k = weight.size(2 + d), size = x.size(2 + d);
    if (g.stride[d] != stride || g.dilation[d] != 1) return std::nullopt;
    b.kernel[d] = k;
    b.taps[d] = (k + 1) / 2;
    b.offset[d] = phases ? 2 * Fold(k).padding : g.padding[d];
    const int64_t out = phases ? size / 2 + Fold(k).shift : window_output(size, k, stride, g.padding[d], 1);
    b.side[d] = out + b.taps[d] - 1;
  }
  return b;
}

Operands prepare(const std::vector<Tensor>& sources, const std::vector<Tensor>& masks, const Tensor& weight,
                 const Ints& upsample, const ConvGeometry& geometry, const Ints& zeroed, bool fold,
                 const std::vector<Tensor>& packed) {
  STD_TORCH_CHECK(packed.empty() || packed.size() == (fold ? sources.size() : 1),
                  "partial_conv2d: packed must hold one weight, or one for each source if folded");
  Operands o;
  const bool alone = sources.size() == 1 && upsample[0] == 1;
  const int64_t outputs = phase_outputs(weight.size(0), weight.scalar_type());
  const ConvGeometry unpadded{{1, 1}, {0, 0}, {1, 1}, 1};
  auto add_blocks = [&](size_t i, const PixelBlocks& b, int64_t first, int64_t n) {
    if constexpr (kMatrixUnits)
      o.add(block_source(sources[i], zeroed[i] ? nullptr : &masks[i], b), block_weight(weight, first, n, b), b.phases,
            unpadded, b);
  };
  if (!fold) {
    const auto blocks = alone ? blocks_of(sources[0], weight, geometry, false) : std::nullopt;
    if (blocks)
      add_blocks(0, *blocks, 0, weight.size(0));
    else
      o.add(alone ? zero_filled(sources[0], masks[0], zeroed[0]) : concat_sources(sources, masks, upsample), weight,
            false, geometry);
    o.packed = !packed.empty() && !suits_plain_weight(o.x[0], weight, geometry);
    if (o.packed) o.weight[0] = packed[0];
    return o;
  }
  o.packed = !packed.empty();
  const Fold f(weight.size(2));
  int64_t first = 0;
  for (size_t i = 0; i < sources.size(); ++i) {
    const int64_t channels = sources[i].size(1);
    const bool low = upsample[i] == 2;
    const auto blocks = low ? std::nullopt : blocks_of(sources[i], weight, geometry, true);
    if (blocks) {
      add_blocks(i, *blocks, first, outputs);
    } else {
      auto filters = [&] {
        if (!packed.empty()) return packed[i];
        if (!low) return slice_weight(weight, first, channels);
        if constexpr (kMatrixUnits) return fold_weight(weight, first, channels, outputs);
        return fold_weight(weight, first, channels);
      };
      o.add(zero_filled(sources[i], masks[i], zeroed[i]), filters(), low,
            low ? ConvGeometry{{1, 1}, {f.padding, f.padding}, {1, 1}, 1} : geometry);
    }
    first += channels;
  }
  return o;
}

// oneDNN's convolution with a weight that was brought into its blocked layout beforehand (inference only).
Tensor packed_convolution(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  using torch::stable::detail::from;
  const std::optional<Tensor> no_bias;
  const std::optional<std::string> no_algorithm;
  std::array<StableIValue, 10> stack{from(x),
                                     from(weight),
                                     from(no_bias),
                                     from(g.padding),
                                     from(g.stride),
                                     from(g.dilation),
                                     from(g.groups),
                                     from(std::string("none")),
                                     from(std::vector<std::optional<double>>{}),
                                     from(no_algorithm)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("mkldnn::_convolution_pointwise", "", stack.data(), TORCH_ABI_VERSION));
  return channels_last(torch::stable::detail::to<Tensor>(stack[0]));
}

// The numerator, as up to two maps: `sum` at full resolution and the `phases` of the folded sources.
struct Numerator {
  std::optional<Tensor> sum, phases;
};

// The geometry comes from the caller, so the sizes that it gives are not taken on trust.
void check_numerator(const Numerator& numerator, const std::vector<int64_t>& size, int64_t shift, ScalarType dtype) {
  if (numerator.sum) check_map("the convolution", *numerator.sum, size, dtype);
  if (numerator.phases)
    check_map("the folded convolution", *numerator.phases,
              {size[0], 4 * phase_outputs(size[1], dtype), size[2] / 2 + shift, size[3] / 2 + shift}, dtype);
}

Numerator convolve(const Operands& o) {
  Numerator out;
  for (size_t i = 0; i < o.x.size(); ++i) {
    Tensor term = o.packed ? packed_convolution(o.x[i], o.weight[i], o.geometry[i])
                           : convolution(o.x[i], o.weight[i], o.geometry[i]);
    std::optional<Tensor>& slot = o.folded[i] ? out.phases : out.sum;
    if (slot)
      accumulate(*slot, term);
    else
      slot = term;
  }
  return out;
}

double window_of(const std::vector<Tensor>& sources, const Tensor& weight) {
  int64_t channels = 0;
  for (const Tensor& s : sources) channels += s.size(1);
  return static_cast<double>(channels * weight.size(2) * weight.size(3));
}

Tensor zeros(int64_t n, ScalarType dtype, const Tensor& like) {
  Tensor t = empty({n}, dtype, like);
  torch::stable::zero_(t);
  return t;
}

// (N, O, H', W'), once the operands are known to fit together.
std::vector<int64_t> checked_output_size(const std::vector<Tensor>& sources, const std::vector<Tensor>& masks,
                                         const Tensor& count, const Tensor& weight, const Ints& upsample,
                                         int64_t groups, const Ints& zeroed) {
  check(sources, masks, count, weight, upsample, groups, zeroed);
  return {sources[0].size(0), weight.size(0), count.size(2), count.size(3)};
}

int64_t elements(const std::vector<int64_t>& size) {
  int64_t n = 1;
  for (int64_t s : size) n *= s;
  return n;
}

int64_t shift_of(const Tensor& weight) { return Fold(weight.size(2)).shift; }

struct Gradients {
  std::vector<Tensor> sources;
  Tensor weight;
};

// Of an empty batch.
Gradients zero_gradients(const std::vector<Tensor>& sources, const Tensor& weight, bool need_sources,
                         bool need_weight) {
  Gradients g;
  for (const Tensor& s : sources)
    g.sources.push_back(need_sources ? zeros_like_size(sizes(s), s) : empty({0}, s.scalar_type(), s));
  g.weight = need_weight ? zeros_like_size(sizes(weight), weight) : empty({0}, weight.scalar_type(), weight);
  return g;
}

// From the gradients of the numerator back to the sources and the weight. What is not needed stays an empty tensor.
Gradients convolve_backward(const Tensor& grad_sum, const std::optional<Tensor>& grad_phases, const Operands& o,
                            const std::vector<Tensor>& sources, const std::vector<Tensor>& masks, const Tensor& weight,
                            const Ints& upsample, const Ints& zeroed, bool fold, bool need_x, bool need_weight) {
  Gradients g;
  const bool as_it_is = o.x.size() == 1 && !o.folded[0] && !o.blocks[0];  // the vendor's gradient is the weight's
  if (!need_weight)
    g.weight = empty({0}, weight.scalar_type(), weight);
  else if (!as_it_is)
    g.weight = empty_channels_last(sizes(weight), weight.scalar_type(), weight);
  int64_t first = 0;
  for (size_t i = 0; i < o.x.size(); ++i) {
    const Tensor& grad = o.folded[i] ? *grad_phases : grad_sum;
    auto [grad_x, grad_w] = convolution_backward(grad, o.x[i], o.weight[i], o.geometry[i], need_x, need_weight);
    if (o.blocks[i]) {
      if constexpr (kMatrixUnits) {
        if (need_weight) unblock_weight_gradient(*grad_w, first, *o.blocks[i], g.weight);
        if (need_x) g.sources.push_back(unblock_gradient(*grad_x, sources[i], *o.blocks[i]));
      }
      first += o.blocks[i]->channels;
      continue;
    }
    if (need_weight) {
      if (o.folded[i])
        unfold_gradient(*grad_w, first, g.weight);
      else if (as_it_is)
        g.weight = *grad_w;
      else
        place_gradient(*grad_w, first, g.weight);
    }
    if (need_x) g.sources.push_back(*grad_x);
    first += o.x[i].size(1);
  }
  if (need_x && !fold && (sources.size() > 1 || upsample[0] == 2)) {
    const Tensor whole = g.sources[0];
    g.sources.clear();
    for (const Tensor& s : sources)
      g.sources.push_back(empty_channels_last({s.size(0), s.size(1), s.size(2), s.size(3)}, s.scalar_type(), s));
    split_gradient(whole, upsample, g.sources);
  }
  for (size_t i = 0; i < sources.size(); ++i) {
    // Whoever wrote the zeros takes no gradient there.
    if (need_x && !zeroed[i]) zero_holes(g.sources[i], masks[i]);
    if (!need_x) g.sources.push_back(empty({0}, sources[i].scalar_type(), sources[i]));
  }
  return g;
}

// The gradients of the numerator's two maps. Nothing is stored for phases that no source has.
std::optional<Tensor> empty_phases(const Operands& o, const Tensor& source, const Tensor& count, int64_t outputs,
                                   int64_t shift) {
  for (bool folded : o.folded)
    if (folded)
      return empty_channels_last({source.size(0), 4 * phase_outputs(outputs, source.scalar_type()),
                                  count.size(2) / 2 + shift, count.size(3) / 2 + shift},
                                 source.scalar_type(), source);
  return std::nullopt;
}

}  // namespace

Tensor partial_conv2d(std::vector<Tensor> sources, std::vector<Tensor> masks, Tensor count, Tensor weight,
                      std::optional<Tensor> bias, std::optional<Tensor> scale, Ints upsample, Ints stride, Ints padding,
                      Ints dilation, int64_t groups, Ints zeroed, std::string activation, double slope,
                      int64_t fold_from, std::optional<std::vector<Tensor>> packed_weights) {
  const DeviceGuard guard(weight);
  const int64_t outputs = weight.size(0);
  const auto size = checked_output_size(sources, masks, count, weight, upsample, groups, zeroed);
  const ScalarType dtype = sources[0].scalar_type();
  if (elements(size) == 0) return empty_channels_last(size, dtype, sources[0]);
  check_channels({bias ? &*bias : nullptr, scale ? &*scale : nullptr}, outputs);
  const bool fold = folds(sources, upsample, weight, fold_from);
  // Optional, since AOTInductor hands an empty list over as None.
  const std::vector<Tensor> packed = packed_weights.value_or(std::vector<Tensor>{});
  const Operands o =
      prepare(sources, masks, weight, upsample, {stride, padding, dilation, groups}, zeroed, fold, packed);
  const Numerator numerator = convolve(o);
  Tensor y = numerator.sum ? *numerator.sum : empty_channels_last(size, dtype, sources[0]);
  check_numerator(numerator, size, shift_of(weight), dtype);
  const Output out = describe_output(y, count, window_of(sources, weight), activation, slope);
  epilogue(y, numerator.sum.has_value(), numerator.phases ? &*numerator.phases : nullptr, shift_of(weight), out,
           scale ? &*scale : nullptr, bias ? &*bias : nullptr);
  return y;
}

// The same with a batch norm of fixed statistics, where no gradient is asked for.
Tensor partial_conv2d_normed(std::vector<Tensor> sources, std::vector<Tensor> masks, Tensor count, Tensor weight,
                             Tensor norm_weight, Tensor norm_bias, Tensor mean, Tensor var, double eps, Ints upsample,
                             Ints stride, Ints padding, Ints dilation, int64_t groups, Ints zeroed,
                             std::string activation, double slope, int64_t fold_from,
                             std::optional<std::vector<Tensor>> packed_weights) {
  const auto [scale, bias] = norm_constants(dense(norm_weight), dense(norm_bias), dense(mean), dense(var), eps);
  return partial_conv2d(sources, masks, count, weight, bias, scale, upsample, stride, padding, dilation, groups, zeroed,
                        activation, slope, fold_from, packed_weights);
}

// partial_conv2d from the masks as the user gave them: also their planes, the counts and the new mask, in the masks'
// type.
std::tuple<Tensor, std::vector<Tensor>, Tensor, Tensor> partial_conv2d_masked(
    std::vector<Tensor> sources, std::vector<Tensor> masks, Tensor weight, std::optional<Tensor> bias,
    std::optional<Tensor> scale, Ints upsample, Ints stride, Ints padding, Ints dilation, int64_t groups, Ints zeroed,
    std::string activation, double slope, int64_t fold_from, std::optional<std::vector<Tensor>> packed_weights) {
  const char* op = "partial_conv2d";
  STD_TORCH_CHECK(!sources.empty() && sources.size() == masks.size() && weight.dim() == 4, op,
                  ": sources and masks must be of one length, at least 1, and weight of 4 dimensions");
  Ints channels;
  for (size_t i = 0; i < sources.size(); ++i) {
    STD_TORCH_CHECK(sources[i].dim() == 4 && masks[i].device() == weight.device(), op,
                    ": sources must be (N, C, H, W), and masks on the weight's device");
    channels.push_back(sources[i].size(1));
  }
  const MaskWindow window =
      window_of_masks(op, masks, channels, upsample, {weight.size(2), weight.size(3)}, stride, padding, dilation);
  Tensor y = partial_conv2d(sources, window.planes, window.counts, weight, bias, scale, upsample, stride, padding,
                            dilation, groups, zeroed, activation, slope, fold_from, packed_weights);
  return {y, window.planes, window.counts, window.valid};
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> partial_conv2d_backward(
    Tensor grad, Tensor y, std::vector<Tensor> sources, std::vector<Tensor> masks, Tensor count, Tensor weight,
    std::optional<Tensor> scale, Ints upsample, Ints stride, Ints padding, Ints dilation, int64_t groups, Ints zeroed,
    std::string activation, double slope, int64_t fold_from, bool need_sources, bool need_weight, bool need_bias) {
  const DeviceGuard guard(weight);
  const int64_t outputs = weight.size(0);
  const ScalarType dtype = y.scalar_type();
  const auto size = checked_output_size(sources, masks, count, weight, upsample, groups, zeroed);
  check_map("y", y, size, sources[0].scalar_type());
  check_map("grad", grad, size, y.scalar_type());
  check_channels({scale ? &*scale : nullptr}, outputs);
  Tensor grad_bias = need_bias ? empty({outputs}, wide(dtype), y) : empty({0}, dtype, y);
  if (y.numel() == 0) {
    torch::stable::zero_(grad_bias);
    Gradients g = zero_gradients(sources, weight, need_sources, need_weight);
    return {g.sources, g.weight, grad_bias};
  }
  const bool fold = folds(sources, upsample, weight, fold_from);
  const Operands o = prepare(sources, masks, weight, upsample, {stride, padding, dilation, groups}, zeroed, fold, {});
  const int64_t shift = shift_of(weight);
  Tensor grad_sum = empty_channels_last(size, dtype, y);
  std::optional<Tensor> grad_phases = empty_phases(o, sources[0], count, outputs, shift);
  const Output out = describe_output(y, count, window_of(sources, weight), activation, slope);
  epilogue_backward(channels_last(grad), channels_last(y), out, scale ? &*scale : nullptr, grad_sum,
                    grad_phases ? &*grad_phases : nullptr, shift, need_bias ? &grad_bias : nullptr);
  Gradients g = convolve_backward(grad_sum, grad_phases, o, sources, masks, weight, upsample, zeroed, fold,
                                  need_sources, need_weight);
  return {g.sources, g.weight, grad_bias};
}

// The numerator is kept for the backward; mean and variance are those of the renormalised map, holes (0) included.
std::tuple<Tensor, Tensor, Tensor, Tensor> partial_conv2d_bn(std::vector<Tensor> sources, std::vector<Tensor> masks,
                                                             Tensor count, Tensor weight, Tensor norm_weight,
                                                             Tensor norm_bias, double eps, Ints upsample, Ints stride,
                                                             Ints padding, Ints dilation, int64_t groups, Ints zeroed,
                                                             std::string activation, double slope, int64_t fold_from) {
  const DeviceGuard guard(weight);
  const int64_t outputs = weight.size(0);
  const auto size = checked_output_size(sources, masks, count, weight, upsample, groups, zeroed);
  check_channels({&norm_weight, &norm_bias}, outputs);
  const ScalarType dtype = sources[0].scalar_type();
  Tensor y = empty_channels_last(size, dtype, sources[0]);
  if (elements(size) == 0) {
    const Tensor none = zeros(outputs, wide(dtype), weight);
    return {y, empty_channels_last(size, dtype, sources[0]), none, zeros(outputs, wide(dtype), weight)};
  }
  Tensor mean = empty({outputs}, wide(dtype), weight), var = empty({outputs}, wide(dtype), weight);
  const bool fold = folds(sources, upsample, weight, fold_from);
  const Operands o = prepare(sources, masks, weight, upsample, {stride, padding, dilation, groups}, zeroed, fold, {});
  const Numerator numerator = convolve(o);
  Tensor conv = numerator.sum ? *numerator.sum : empty_channels_last(size, dtype, sources[0]);
  check_numerator(numerator, size, shift_of(weight), dtype);
  const Output out = describe_output(conv, count, window_of(sources, weight), activation, slope);
  batch_statistics(conv, numerator.sum.has_value(), numerator.phases ? &*numerator.phases : nullptr, shift_of(weight),
                   out, mean, var);
  batch_norm(conv, out, mean, var, norm_weight, norm_bias, eps, y);
  return {y, conv, mean, var};
}

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor> partial_conv2d_bn_backward(
    Tensor grad, Tensor conv, Tensor mean, Tensor var, std::vector<Tensor> sources, std::vector<Tensor> masks,
    Tensor count, Tensor weight, Tensor norm_weight, Tensor norm_bias, double eps, Ints upsample, Ints stride,
    Ints padding, Ints dilation, int64_t groups, Ints zeroed, std::string activation, double slope, int64_t fold_from,
    bool need_sources, bool need_weight) {
  const DeviceGuard guard(weight);
  const int64_t outputs = weight.size(0);
  const ScalarType dtype = conv.scalar_type();
  const auto size = checked_output_size(sources, masks, count, weight, upsample, groups, zeroed);
  check_map("conv", conv, size, sources[0].scalar_type());
  check_map("grad", grad, size, conv.scalar_type());
  check_channels({&norm_weight, &norm_bias, &mean, &var}, outputs);
  Tensor grad_norm_weight = empty({outputs}, norm_weight.scalar_type(), conv);
  Tensor grad_norm_bias = empty({outputs}, norm_bias.scalar_type(), conv);
  if (conv.numel() == 0) {
    Gradients g = zero_gradients(sources, weight, need_sources, need_weight);
    torch::stable::zero_(grad_norm_weight);
    torch::stable::zero_(grad_norm_bias);
    return {g.sources, g.weight, grad_norm_weight, grad_norm_bias};
  }
  const bool fold = folds(sources, upsample, weight, fold_from);
  const Operands o = prepare(sources, masks, weight, upsample, {stride, padding, dilation, groups}, zeroed, fold, {});
  const int64_t shift = shift_of(weight);
  Tensor grad_sum = empty_channels_last(size, dtype, conv);
  std::optional<Tensor> grad_phases = empty_phases(o, sources[0], count, outputs, shift);
  const Output out = describe_output(conv, count, window_of(sources, weight), activation, slope);
  batch_norm_backward(channels_last(grad), conv, out, mean, var, norm_weight, norm_bias, eps, grad_sum,
                      grad_phases ? &*grad_phases : nullptr, shift, grad_norm_weight, grad_norm_bias);
  Gradients g = convolve_backward(grad_sum, grad_phases, o, sources, masks, weight, upsample, zeroed, fold,
                                  need_sources, need_weight);
  return {g.sources, g.weight, grad_norm_weight, grad_norm_bias};
}

}  // namespace fused_inpaint::FUSED_INPAINT_DEVICE
