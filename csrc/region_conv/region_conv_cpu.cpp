// SPDX-License-Identifier: Apache-2.0
// Region-wise convolution on the CPU.
#define FUSED_INPAINT_DEVICE cpu
#include "region_conv/region_conv.h"

#include <tuple>

#include "common/exp.h"
#include "region_conv/region_rows_cpu.h"
#include "tap_conv/tap_rows_cpu.h"

namespace fused_inpaint::cpu {
namespace {

template <bool elu, typename A>
FUSED_INPAINT_INLINE A activate(A v) {
  if constexpr (!elu) return v;
  // One of the two is 0. A choice between two results would become a branch, and the loop no vectors.
  const A above = v > 0 ? v : A(0), below = v > 0 ? A(0) : v;
  return above + exp_minus_one(below);
}

template <typename T, bool elu>
FUSED_INPAINT_CLONES void finish(const T* sum, const acc_t<T>* __restrict bias, T* __restrict y, int64_t n) {
  for (int64_t c = 0; c < n; ++c) store(y + c, activate<elu>(acc_t<T>(load(sum[c])) + bias[c]));
}

template <typename F>
void with_flag(bool flag, F&& body) {
  flag ? body.template operator()<true>() : body.template operator()<false>();
}

// In the accumulator's type; zeros if there is none.
template <typename A>
std::vector<A> widen(const std::optional<Tensor>& t, int64_t n) {
  std::vector<A> out(n, A(0));
  if (t)
    dispatch_float("region_conv2d", t->scalar_type(), [&]<typename S>() {
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<A>(load(data<S>(*t)[i]));
    });
  return out;
}

// Gradient in front of the activation for the pixels [begin, end), written unless out is null, and its sums: of
// everything (mask null) or of each region. y is the activation's output, whose derivative is y + 1 below 0.
template <typename T, bool elu>
FUSED_INPAINT_CLONES void activation_gradient_block(const T* grad, const T* y, T* out, int64_t channels,
                                                    const uint8_t* mask, int64_t area, acc_t<T>* sums, int64_t begin,
                                                    int64_t end) {
  using A = acc_t<T>;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const T* g = grad + pixel * channels;
    A* __restrict sum = sums + (mask && mask[pixel % area] ? channels : 0);
    if constexpr (elu) {
      const T* o = y + pixel * channels;
      T* __restrict to = out + pixel * channels;
      for (int64_t c = 0; c < channels; ++c) {
        const A slope = A(load(o[c])) + 1, scaled = A(load(g[c])) * slope;
        const A v = load(o[c]) > 0 ? A(load(g[c])) : scaled;
        sum[c] += v;
        store(to + c, v);
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) sum[c] += load(g[c]);
    }
  }
}

// Sums run over blocks of a fixed number of pixels, merged in their order.
Tensor activation_gradient(const Tensor& grad_, const Tensor& y_, const Geometry& g, const Tensor* mask,
                           Tensor* grad_bias) {
  const Tensor grad = channels_last(grad_);
  if (!g.elu && !grad_bias) return grad;
  const Tensor y = g.elu ? channels_last(y_) : grad;
  Tensor out = g.elu ? empty_channels_last(sizes(grad), grad.scalar_type(), grad) : grad;
  const int64_t channels = grad.size(1), pixels = grad.numel() / channels, regions = mask ? 2 : 1;
  const int64_t size = std::clamp<int64_t>(16384 / channels, 16, 1024), blocks = ceil_div(pixels, size);
  dispatch_float("region_conv2d", grad.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    const T *from = data<T>(grad), *o = data<T>(y);
    T* to = g.elu ? mutable_data<T>(out) : nullptr;
    const uint8_t* m = mask ? data<uint8_t>(*mask) : nullptr;
    const int64_t area = mask ? mask->numel() : 1;
    std::vector<A> sums(blocks * regions * channels, A(0));
    with_flag(g.elu, [&]<bool elu>() {
      parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b)
          activation_gradient_block<T, elu>(from, o, to, channels, m, area, sums.data() + b * regions * channels,
                                            b * size, std::min(pixels, (b + 1) * size));
      });
    });
    if (!grad_bias) return;
    std::vector<double> total(regions * channels, 0.0);
    for (int64_t b = 0; b < blocks; ++b)
      for (size_t i = 0; i < total.size(); ++i) total[i] += sums[b * total.size() + i];
    for (size_t i = 0; i < total.size(); ++i) mutable_data<A>(*grad_bias)[i] = static_cast<A>(total[i]);
  });
  return out;
}

// The filter that a row of each kind is multiplied with, channels last: (phases * O, channels, taps, taps).
using Filters = std::array<std::optional<Tensor>, kKinds>;

// (taps * channels, outputs) of the filters.
template <typename T>
Filters as_right_operands(const Filters& filters) {
  Filters out;
  for (int kind = 0; kind < kKinds; ++kind)
    if (const auto& f = filters[kind]) {
      const int64_t outputs = f->size(0), depth = f->numel() / outputs;
      out[kind] = matrix(data<T>(*f), depth, outputs, 1, depth, *f);
    }
  return out;
}

// Calls visit(row of the filter, tap of `readers`, output channel); a filter's row has the channels of one tap.
template <typename F>
void each_filter_row(const Geometry& g, int64_t outputs, F&& visit) {
  const Side &y = g.side[0], &x = g.side[1];
  for (int64_t a = 0; a < y.phases(); ++a)
    for (int64_t b = 0; b < x.phases(); ++b)
      for (int64_t o = 0; o < outputs; ++o)
        for (int64_t s = 0; s < y.taps(); ++s)
          for (int64_t t = 0; t < x.taps(); ++t)
            visit((((a * x.phases() + b) * outputs + o) * y.taps() + s) * x.taps() + t,
                  reader_tap(y, s, a) * x.taps() * x.phases() + reader_tap(x, t, b), o);
}

// (reader taps * parts * O, channels): what carries a gradient back through the filters, which lie side by side in a
// mixed row.
template <typename T>
Tensor transposed(const Geometry& g, const std::vector<Tensor>& parts) {
  const int64_t channels = parts[0].size(1), outputs = parts[0].size(0) / g.phases();
  const int64_t n = static_cast<int64_t>(parts.size());
  Tensor out = empty({parts[0].numel() / channels * n, channels}, parts[0].scalar_type(), parts[0]);
  for (int64_t part = 0; part < n; ++part)
    each_filter_row(g, outputs, [&](int64_t row, int64_t tap, int64_t o) {
      std::memcpy(mutable_data<T>(out) + ((tap * n + part) * outputs + o) * channels,
                  data<T>(parts[part]) + row * channels, channels * sizeof(T));
    });
  return out;
}

Tensor filter_slice(const Tensor& weight, int64_t first, int64_t channels, const Geometry& g) {
  if (g.folded()) return fold_weight(weight, first, channels);
  if (channels == weight.size(1)) return channels_last(weight);
  Tensor view = weight;
  return clone_channels_last(torch::stable::narrow(view, 1, first, channels));
}

// (2, O, C, kh, kw) -> O of the hole and O of valid pixels, each (O, C, kh, kw) channels last.
std::array<Tensor, 2> filters_by_region(const Tensor& weight) {
  Tensor view = weight;
  return {channels_last(torch::stable::select(view, 0, 0)), channels_last(torch::stable::select(view, 0, 1))};
}

// The rows of pixels that belong to the region other than `region`, set to 0.
void clear_others(Tensor& grad, const Tensor& mask, int region) {
  const int64_t bytes = grad.size(1) * static_cast<int64_t>(grad.element_size()), area = mask.numel();
  const uint8_t* m = data<uint8_t>(mask);
  char* to = mutable_data<char>(grad);
  parallel_for(0, grad.numel() / grad.size(1), 4096, [&](int64_t begin, int64_t end) {
    for (int64_t pixel = begin; pixel < end; ++pixel)
      if ((m[pixel % area] != 0) != (region == kValid)) std::memset(to + pixel * bytes, 0, bytes);
  });
}

Tensor empty_like_or_none(const Tensor& x, bool wanted) {
  return wanted ? empty_channels_last(sizes(x), x.scalar_type(), x) : empty({0}, x.scalar_type(), x);
}

Tensor empty_bias_gradient(const std::vector<int64_t>& size, const Tensor& like, bool wanted) {
  Tensor out = empty(wanted ? size : std::vector<int64_t>{0}, wide(like.scalar_type()), like);
  torch::stable::zero_(out);
  return out;
}

template <typename T>
std::array<const T*, 2> pointers(const std::array<Tensor, 2>& maps) {
  return {data<T>(maps[0]), data<T>(maps[1])};
}

// Whether each input pixel can be multiplied with all taps of its own filter before the taps are shifted: no row is of
// two regions then. A half type would round what is summed.
bool by_taps(const Geometry& g, ScalarType dtype) {
  bool same = dtype == wide(dtype);
  for (const Side& s : g.side)
    same = same && s.kernel == g.side[0].kernel && s.kernel % 2 == 1 && s.padding == s.kernel / 2 && s.stride == 1 &&
           s.dilation == 1;
  return same;
}

TapConv as_taps(const Geometry& g, const Tensor& existing, const Tensor& weight) {
  return {existing.size(0),
          weight.size(1),
          existing.size(2),
          existing.size(3),
          weight.size(0),
          g.side[0].kernel,
          g.side[0].upsample == 2 ? Upsampling::nearest : Upsampling::none,
          g.side[0].mode,
          g.elu ? TapActivation::elu : TapActivation::none,
          0.0};
}

}  // namespace

Tensor region_conv2d_output(Tensor x_, Tensor mask, Tensor weight, std::optional<Tensor> bias, Ints stride,
                            Ints padding, Ints dilation, std::string padding_mode, std::string activation) {
  const Geometry g = describe_output(x_, mask, weight, stride, padding, dilation, padding_mode, activation);
  const int64_t outputs = weight.size(1), channels = x_.size(1);
  check_bias(bias, 2 * outputs);
  Tensor y = empty_channels_last(output_sizes(x_, outputs, g), x_.scalar_type(), x_);
  if (y.numel() == 0) return y;
  const Tensor x = channels_last(x_);
  const std::array<Tensor, 2> filters = filters_by_region(weight);
  const Axis rows = windows(g.side[0]), columns = windows(g.side[1]);
  dispatch_float("region_conv2d", x.scalar_type(), [&]<typename T>() {
    const auto b = widen<acc_t<T>>(bias, 2 * outputs);
    const Gather<T> gather{rows, columns, x.size(2), x.size(3), {data<T>(x), data<T>(x)}, {channels, channels}};
    T* to = mutable_data<T>(y);
    with_flag(g.elu, [&]<bool elu>() {
      multiply_rows(gather, Rows(own_regions(mask), y.numel() / outputs),
                    as_right_operands<T>({filters[kHole], filters[kValid], std::nullopt}),
                    [&](int kind, int64_t row, const T* sum) {
                      finish<T, elu>(sum, b.data() + kind * outputs, to + row * outputs, outputs);
                    });
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> region_conv2d_output_backward(Tensor grad, Tensor y, Tensor x_, Tensor mask,
                                                                 Tensor weight, Ints stride, Ints padding,
                                                                 Ints dilation, std::string padding_mode,
                                                                 std::string activation, bool need_x, bool need_weight,
                                                                 bool need_bias) {
  const Geometry g = describe_output(x_, mask, weight, stride, padding, dilation, padding_mode, activation);
  const int64_t outputs = weight.size(1), channels = x_.size(1);
  check_map("grad", grad, output_sizes(x_, outputs, g), x_.scalar_type());
  check_map("y", y, output_sizes(x_, outputs, g), x_.scalar_type());
  Tensor grad_x = empty_like_or_none(x_, need_x), grad_bias = empty_bias_gradient({2, outputs}, x_, need_bias);
  Tensor grad_weight = empty(need_weight ? sizes(weight) : std::vector<int64_t>{0}, weight.scalar_type(), weight);
  if (grad.numel() == 0) {
    torch::stable::zero_(grad_x);
    torch::stable::zero_(grad_weight);
    return {grad_x, grad_weight, grad_bias};
  }
  const Tensor sum = activation_gradient(grad, y, g, &mask, need_bias ? &grad_bias : nullptr);
  dispatch_float("region_conv2d", x_.scalar_type(), [&]<typename T>() {
    if (need_x) {
      const std::array<Tensor, 2> filters = filters_by_region(weight);
      const Axis rows = readers(g.side[0]), columns = readers(g.side[1]);
      const Gather<T> gather{rows,
                             columns,
                             sum.size(2),
                             sum.size(3),
                             {data<T>(sum), data<T>(sum)},
                             {outputs, outputs},
                             data<uint8_t>(mask),
                             mask.size(0)};
      T* to = mutable_data<T>(grad_x);
      multiply_rows(
          gather, Rows(window_regions(mask, rows, columns), grad_x.numel() / channels),
          {transposed<T>(g, {filters[kHole]}), transposed<T>(g, {filters[kValid]}),
           transposed<T>(g, {filters[kValid], filters[kHole]})},
          [&](int, int64_t row, const T* values) { std::memcpy(to + row * channels, values, channels * sizeof(T)); });
    }
    if (need_weight) {
      const Tensor x = channels_last(x_);
      const Axis rows = windows(g.side[0]), columns = windows(g.side[1]);
      const Gather<T> gather{rows, columns, x.size(2), x.size(3), {data<T>(x), data<T>(x)}, {channels, channels}};
      const auto sums = multiply_transposed<T>(gather, Rows(own_regions(mask), sum.numel() / outputs),
                                               {data<T>(sum), data<T>(sum)}, {outputs, outputs}, {true, true}, sum);
      const int64_t taps = gather.taps();
      T* to = mutable_data<T>(grad_weight);
      for (const Tensor& of_region : sums) {
        const acc_t<T>* from = data<acc_t<T>>(of_region);
        for (int64_t o = 0; o < outputs; ++o, from += taps * channels)
          for (int64_t c = 0; c < channels; ++c)
            for (int64_t tap = 0; tap < taps; ++tap) store(to++, from[tap * channels + c]);
      }
    }
  });
  return {grad_x, grad_weight, grad_bias};
}

Tensor region_conv2d_input(Tensor existing_, Tensor missing_, Tensor mask, Tensor weight, std::optional<Tensor> bias,
                           int64_t upsample, Ints stride, Ints padding, Ints dilation, std::string padding_mode,
                           std::string activation) {
  const Geometry g =
      describe_input(existing_, missing_, mask, weight, upsample, stride, padding, dilation, padding_mode, activation);
  const int64_t outputs = weight.size(0), valid = existing_.size(1), hole = missing_.size(1);
  check_bias(bias, outputs);
  Tensor y = empty_channels_last(output_sizes(existing_, outputs, g), existing_.scalar_type(), existing_);
  if (y.numel() == 0) return y;
  const Tensor existing = channels_last(existing_), missing = channels_last(missing_);
  if (by_taps(g, y.scalar_type())) {
    const TapConv c = as_taps(g, existing, weight);
    const auto run = [&]<typename T>() {
      const auto b = widen<T>(bias, outputs);
      convolve_taps<T>(c, {{{missing}, valid}, {{existing}, 0}}, &mask, weight, b.data(), y);
    };
    y.scalar_type() == ScalarType::Double ? run.template operator()<double>() : run.template operator()<float>();
    return y;
  }
  const Side &sy = g.side[0], &sx = g.side[1];
  const Axis rows = windows(sy), columns = windows(sx);
  const Rows sorted(window_regions(mask, rows, columns), y.size(0) * rows.positions * columns.positions);
  Filters filters;
  if (sorted.count(kHole)) filters[kHole] = filter_slice(weight, valid, hole, g);
  if (sorted.count(kValid)) filters[kValid] = filter_slice(weight, 0, valid, g);
  if (sorted.count(kMixed)) filters[kMixed] = filter_slice(weight, 0, valid + hole, g);
  dispatch_float("region_conv2d", y.scalar_type(), [&]<typename T>() {
    const auto b = widen<acc_t<T>>(bias, outputs);
    const Gather<T> gather{rows,
                           columns,
                           sy.size,
                           sx.size,
                           {data<T>(missing), data<T>(existing)},
                           {hole, valid},
                           data<uint8_t>(mask),
                           mask.size(0)};
    T* to = mutable_data<T>(y);
    with_flag(g.elu, [&]<bool elu>() {
      multiply_rows(gather, sorted, as_right_operands<T>(filters), [&](int, int64_t row, const T* sum) {
        const int64_t gx = row % columns.positions, line = row / columns.positions;
        const int64_t gy = line % rows.positions, n = line / rows.positions;
        for (int64_t a = 0; a < sy.phases(); ++a)
          for (int64_t c = 0; c < sx.phases(); ++c, sum += outputs) {
            const int64_t i = sy.target(gy, a), j = sx.target(gx, c);
            if (i >= 0 && i < sy.out && j >= 0 && j < sx.out)
              finish<T, elu>(sum, b.data(), to + ((n * sy.out + i) * sx.out + j) * outputs, outputs);
          }
      });
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> region_conv2d_input_backward(
    Tensor grad, Tensor y, Tensor existing, Tensor missing, Tensor mask, Tensor weight, int64_t upsample, Ints stride,
    Ints padding, Ints dilation, std::string padding_mode, std::string activation, bool need_existing,
    bool need_missing, bool need_weight, bool need_bias) {
  const Geometry g =
      describe_input(existing, missing, mask, weight, upsample, stride, padding, dilation, padding_mode, activation);
  const int64_t outputs = weight.size(0);
  const ScalarType dtype = existing.scalar_type();
  check_map("grad", grad, output_sizes(existing, outputs, g), dtype);
  check_map("y", y, output_sizes(existing, outputs, g), dtype);
  // Of the hole, of valid pixels.
  std::array<Tensor, 2> grad_maps{empty_like_or_none(missing, need_missing),
                                  empty_like_or_none(existing, need_existing)};
  Tensor grad_bias = empty_bias_gradient({outputs}, existing, need_bias);
  Tensor grad_weight = empty({0}, dtype, weight);
  if (need_weight) {
    grad_weight = empty_channels_last(sizes(weight), wide(dtype), weight);
    torch::stable::zero_(grad_weight);
  }
  if (grad.numel() == 0) {
    for (Tensor& t : grad_maps) torch::stable::zero_(t);
    return {grad_maps[kValid], grad_maps[kHole], need_weight ? cast(grad_weight, dtype) : grad_weight, grad_bias};
  }
  const Tensor sum = activation_gradient(grad, y, g, nullptr, need_bias ? &grad_bias : nullptr);
  const Axis rows = readers(g.side[0]), columns = readers(g.side[1]);
  const Rows sorted(own_regions(mask), existing.numel() / existing.size(1));
  const std::array<int64_t, 2> channels{missing.size(1), existing.size(1)}, first{existing.size(1), 0};
  const std::array<bool, 2> wanted{need_missing, need_existing};
  dispatch_float("region_conv2d", dtype, [&]<typename T>() {
    using A = acc_t<T>;
    const Gather<T> gather{rows, columns, sum.size(2), sum.size(3), {data<T>(sum), data<T>(sum)}, {outputs, outputs}};
    Filters filters;
    std::array<T*, 2> to{};
    for (int kind : {kHole, kValid})
      if (wanted[kind]) {
        filters[kind] = transposed<T>(g, {filter_slice(weight, first[kind], channels[kind], g)});
        clear_others(grad_maps[kind], mask, kind);
        to[kind] = mutable_data<T>(grad_maps[kind]);
      }
    multiply_rows(gather, sorted, filters, [&](int kind, int64_t row, const T* values) {
      std::memcpy(to[kind] + row * channels[kind], values, channels[kind] * sizeof(T));
    });
    if (!need_weight) return;
    const std::array<Tensor, 2> maps{channels_last(missing), channels_last(existing)};
    const auto sums = multiply_transposed<T>(gather, sorted, pointers<T>(maps), channels, {true, true}, sum);
    for (int kind : {kHole, kValid}) {
      const int64_t c = channels[kind], across = sums[kind].size(1);
      const A* from = data<A>(sums[kind]);
      const auto place = [&](A* gradient, int64_t stride) {
        each_filter_row(g, outputs, [&](int64_t row, int64_t tap, int64_t o) {
          for (int64_t i = 0; i < c; ++i) gradient[row * stride + i] = from[i * across + tap * outputs + o];
        });
      };
      if (g.folded()) {
        Tensor folded = empty_channels_last({4 * outputs, c, 2, 2}, wide(dtype), weight);
        place(mutable_data<A>(folded), c);
        unfold_gradient(folded, first[kind], grad_weight);
      } else {
        place(mutable_data<A>(grad_weight) + first[kind], weight.size(1));
      }
    }
  });
  if (need_weight && wide(dtype) != dtype) grad_weight = cast(grad_weight, dtype);
  return {grad_maps[kValid], grad_maps[kHole], grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(fused_inpaint, CPU, m) {
  m.impl("region_conv2d_output", TORCH_BOX(&region_conv2d_output));
  m.impl("region_conv2d_output_backward", TORCH_BOX(&region_conv2d_output_backward));
  m.impl("region_conv2d_input", TORCH_BOX(&region_conv2d_input));
  m.impl("region_conv2d_input_backward", TORCH_BOX(&region_conv2d_input_backward));
}

}  // namespace fused_inpaint::cpu
