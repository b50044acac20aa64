#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "border_weight_map/numerics.h"
#include "border_weight_map/operands.h"
#include "border_weight_map/ridge.h"
#include "border_weight_map/search.h"
#include "common/dispatch.h"
#include "common/first_bad.h"
#include "common/simd.h"
#include "common/tensors.h"

namespace unet_fast::border_weight_map {
namespace {

constexpr int64_t kColumns = 64;         // columns swept together
constexpr int64_t kBandBytes = 1 << 19;  // target size of a band's nearest objects

// ---- Sinks, which turn the nearest objects of a row into results

// Square roots of squared distances. `exact`: every square is exactly representable in float.
template <typename D>
UNET_FAST_SIMD void roots(const D* squares, int64_t n, bool exact, float* out) {
  if (exact) {
    for (int64_t i = 0; i < n; ++i) {
      const float square = static_cast<float>(squares[i]);
      out[i] = root(squares[i] < kFar<D> ? square : kFar<float>);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = root(squares[i]);
  }
}

// Sink of two_nearest: writes the distances.
struct Distances {
  static constexpr bool kOfAllPixels = true;
  float *first, *second;
  bool exact_in_float;  // whether all squared distances are exact in float

  template <typename D>
  Reaches<D> reaches() const {
    return Reaches<D>::unlimited();
  }
  // Initial values of the search along the last axis.
  template <typename D>
  void start(View<D> pixels, int64_t, int64_t n, View<D> found) const {
    copy(pixels, n, found);
  }
  template <typename D>
  void finish(View<D> found, int64_t from, int64_t n) const {
    roots(found.first, n, exact_in_float, first + from);
    roots(found.second, n, exact_in_float, second + from);
  }
};

// Copies the distances of pixels that get a term; sets others to 0, so that none is searched from.
template <typename D>
UNET_FAST_SIMD void copy_where_needed(View<D> pixels, const uint8_t* target, int64_t n,
                                      bool everywhere, View<D> found) {
  UNET_FAST_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const bool gets_term = gets_border(target[i], everywhere);
    const D first = pixels.first[i], second = pixels.second[i];
    found.first[i] = gets_term ? first : 0;
    found.second[i] = gets_term ? second : 0;
    found.label[i] = pixels.label[i];
  }
}

UNET_FAST_SIMD void class_weights(const uint8_t* target, int64_t n, const float* of_class,
                                  int64_t classes, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = 0;
  for (int32_t c = 0; c < classes; ++c) {
    const float weight = of_class[c];
    for (int64_t i = 0; i < n; ++i) out[i] = target[i] == c ? weight : out[i];
  }
}

UNET_FAST_SIMD void add_terms(const float* first, const float* second, const uint8_t* target,
                              int64_t n, bool everywhere, Terms terms, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const bool gets_term = gets_border(target[i], everywhere);
    const float term = terms.border(first[i] + second[i]);
    out[i] += gets_term ? term : 0.0f;
  }
  if (terms.halo.height == 0) return;
  for (int64_t i = 0; i < n; ++i) {
    const float halo = terms.halo(first[i]);
    out[i] += target[i] == 0 ? halo : 0.0f;
  }
}

// Sink of border_weights: class weights plus the border and halo terms.
struct Weights {
  static constexpr bool kOfAllPixels = false;
  const Settings& settings;
  Terms terms;
  const float* of_classes;  // class weights, (images, classes)
  int64_t volume;           // pixels per image
  bool adds;                // whether `out` holds the weights of earlier classes
  const uint8_t* target;
  float* out;

  template <typename D>
  Reaches<D> reaches() const {
    return terms.reaches<D>();
  }
  template <typename D>
  void start(View<D> pixels, int64_t from, int64_t n, View<D> found) const {
    copy_where_needed(pixels, target + from, n, settings.everywhere, found);
  }
  template <typename D>
  void finish(View<D> found, int64_t from, int64_t n) const {
    float* const to = out + from;
    if (!adds) {
      class_weights(target + from, n, of_classes + from / volume * settings.classes,
                    settings.classes, to);
    }
    float first[kColumns], second[kColumns];
    for (int64_t i = 0; i < n; i += kColumns) {
      const int64_t run = std::min(kColumns, n - i);
      roots(found.first + i, run, true, first);
      roots(found.second + i, run, true, second);
      add_terms(first, second, target + from + i, run, settings.everywhere, terms, to + i);
    }
  }
};

// ---- The transform

template <typename D>
D squared_size(double size) {
  return static_cast<D>(size * size);
}

// Slices cut into bands of rows, small enough that the nearest objects of a band stay in the cache.
// The state of the column sweeps is stored where they enter each band, so bands are independent.
struct Bands {
  explicit Bands(const Shape& shape)
      : rows(std::clamp<int64_t>(kBandBytes / (16 * shape.width), 8, 64)),
        in_slice(groups(shape.height, rows)),
        count(shape.images * shape.depth * in_slice),
        above(count * shape.width),
        below(count * shape.width),
        from_above(above.view()),
        from_below(below.view()) {}
  Bands(const Bands&) = delete;

  int64_t rows, in_slice, count;
  // State of the sweeps as they enter each band from above and from below, (count, width).
  Columns above, below;
  ColumnView from_above, from_below;
};

// Sweeps kColumns columns (or fewer) of slice number `slice`, from column x on, down and up, and
// stores the state in which the sweeps enter each band.
void sweep(const Labels& labels, int32_t c, const Shape& shape, int64_t slice, int64_t x,
           const Bands& bands) {
  const int64_t n = std::min(kColumns, shape.width - x), height = shape.height;
  int32_t objects[kColumns];
  Columns down(n), up(n);
  const auto band = [&](int64_t y) { return (slice * bands.in_slice + y / bands.rows); };
  for (int64_t y = 0; y < height; ++y) {
    if (y % bands.rows == 0) bands.from_above.copy(down.view(), 0, n, band(y) * shape.width + x);
    labels.read((slice * height + y) * shape.width + x, n, c, objects);
    meet(objects, n, static_cast<int32_t>(y), down.view());
  }
  for (int64_t y = height - 1; y >= 0; --y) {
    if (y == height - 1 || (y + 1) % bands.rows == 0) {
      bands.from_below.copy(up.view(), 0, n, band(y) * shape.width + x);
    }
    const int64_t from = (slice * height + y) * shape.width + x;
    meet(labels.read_checked(from, n, c, objects), n, static_cast<int32_t>(height - 1 - y),
         up.view());
  }
}

// The nearest objects of all pixels of volumes, between the search along rows and that along the
// depth. Distances in the padding of rows are 0, so that nothing is searched from there.
template <typename D>
struct Volumes {
  Volumes(const Tensor& like, const Shape& shape)
      : pitch(row_pitch(shape.width)), rows(shape.images * shape.depth * shape.height) {
    const int64_t n = rows * pitch;
    memory = new_tensor(like, {n * static_cast<int64_t>(2 * sizeof(D) + 2 * sizeof(LabelOf<D>))},
                        aoti_torch_dtype_uint8());
    D* const squares = static_cast<D*>(memory.data_ptr());
    auto* const ids = reinterpret_cast<LabelOf<D>*>(squares + 2 * n);
    view = {squares, squares + n, ids, ids + n};
  }
  View<D> row(int64_t i) const { return view.from(i * pitch); }

  int64_t pitch, rows;
  Tensor memory;
  View<D> view;
};

// Caps the squared distance to the second nearest object by the result of the previous row: from
// row to row the distance changes by at most the pixel size. A strict bound, also after rounding.
template <typename D>
UNET_FAST_SIMD void limit_second(const D* before, int64_t n, double size, D* second) {
  for (int64_t i = 0; i < n; ++i) {
    const double distance = std::sqrt(static_cast<double>(before[i])) + size;
    const double limit = distance * distance * (1 + 1e-9) + (std::is_integral_v<D> ? 2 : 0);
    const D known = before[i] < kFar<D> ? static_cast<D>(limit) : kFar<D>;
    second[i] = known < second[i] ? known : second[i];
  }
}

// Finds the two nearest objects within columns for n rows of slice number `slice`, from row y on,
// starting from the state in which the sweeps enter the band.
template <typename D>
void sweep_band(const Labels& labels, int32_t c, const Shape& shape, const Bands& bands,
                int64_t band, int64_t slice, int64_t y, int64_t n, D scale, int32_t* objects,
                ColumnView columns, View<D> rows, int64_t pitch) {
  const int64_t width = shape.width;
  columns.copy(bands.from_above, band * width, width, 0);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t from = (slice * shape.height + y + i) * width;
    step_down(labels.read_checked(from, width, c, objects), width, static_cast<int32_t>(y + i),
              scale, columns, rows.from(i * pitch));
  }
  columns.copy(bands.from_below, band * width, width, 0);
  for (int64_t i = n - 1; i >= 0; --i) {
    step_up(width, static_cast<int32_t>(shape.height - 1 - y - i), scale, columns,
            rows.from(i * pitch));
  }
}

// Finds the two nearest objects of every pixel within its slice, along columns and rows, band by
// band. Those of images go to `sink` row by row, those of volumes to `volumes`.
template <typename D, typename Sink>
void search_bands(const Labels& labels, int32_t c, const Shape& shape, const Spacing& spacing,
                  const Bands& bands, const Volumes<D>* volumes, const Sink& sink) {
  const int64_t width = shape.width, pitch = row_pitch(width);
  const D down = squared_size<D>(spacing.y), across = squared_size<D>(spacing.x);
  const Reaches<D> reaches = sink.template reaches<D>();
  const Reach<D>& reach = volumes == nullptr ? reaches.last : reaches.other;
  const bool far = reaches.most > kFarSearch * spacing.x;
  torch::stable::parallel_for(0, bands.count, 1, [&](int64_t begin, int64_t end) {
    Columns columns(width);
    std::vector<int32_t> objects(width);
    Pixels<D> band(kMargin + bands.rows * pitch);  // no objects before, between and after the rows
    Pixels<D> results(2 * pitch, 0);               // of this row and the previous one
    RowSearch<D> search(width, across, reach, far, Sink::kOfAllPixels);
    bool follows = false;  // whether `results` holds the previous row
    for (int64_t b = begin; b < end; ++b) {
      const int64_t slice = b / bands.in_slice, y = b % bands.in_slice * bands.rows;
      const int64_t n = std::min(bands.rows, shape.height - y);
      const View<D> rows = band.view().from(kMargin);
      sweep_band(labels, c, shape, bands, b, slice, y, n, down, objects.data(), columns.view(),
                 rows, pitch);
      follows = follows && y > 0;
      for (int64_t i = 0; i < n; ++i) {
        const View<D> in_column = rows.from(i * pitch);
        const int64_t row = slice * shape.height + y + i;
        if (volumes != nullptr) {
          const View<D> found = volumes->row(row);
          copy(in_column, width, found);
          for (int64_t x = width; x < pitch; ++x) found.set(x, {0, 0, 0, 0});
          search.template find<false>(in_column, found);
          continue;
        }
        const View<D> found = results.view().from(row % 2 * pitch);
        sink.start(in_column, row * width, width, found);
        if (Sink::kOfAllPixels && far && follows) {
          limit_second(results.second.data() + (row + 1) % 2 * pitch, width, spacing.y,
                       found.second);
        }
        search.template find<true>(in_column, found);
        sink.finish(found, row * width, width);
        follows = true;
      }
    }
  });
}

// Searches along the depth of volumes, the last axis. Pixels in front of one another are far apart
// in memory, so those of kColumns columns are copied side by side first.
template <typename D, typename Sink>
void search_depth(const Shape& shape, D scale, const Volumes<D>& nearest, const Sink& sink) {
  const Reach<D> reach = sink.template reaches<D>().last;
  const int64_t in_row = groups(shape.width, kColumns), depth = shape.depth;
  const int64_t blocks = shape.images * shape.height * in_row;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    Pixels<D> copied(depth * kColumns);
    Pixels<D> result(kColumns, 0);
    const View<D> block = copied.view(), found = result.view();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t x = task % in_row * kColumns, n = std::min(kColumns, shape.width - x);
      const int64_t y = task / in_row % shape.height, image = task / in_row / shape.height;
      const auto row = [&](int64_t z) { return (image * depth + z) * shape.height + y; };
      for (int64_t z = 0; z < depth; ++z) {
        copy(nearest.row(row(z)).from(x), kColumns, block.from(z * kColumns));
      }
      for (int64_t i = n; i < kColumns; ++i) found.set(i, {0, 0, 0, 0});  // nothing to search from
      for (int64_t z = 0; z < depth; ++z) {
        const View<D> here = block.from(z * kColumns);
        const int64_t from = row(z) * shape.width + x;
        sink.start(here, from, n, found);
        for (int64_t i = 0; i < n; i += kLanes<D>) {
          search<true, false>(here.from(i), kColumns, z, depth - 1 - z, scale, reach,
                              static_cast<const Summary<D>*>(nullptr), i, found.from(i));
        }
        sink.finish(found, from, n);
      }
    }
  });
}

// Sweeps the whole columns of all slices, and checks the labels.
void sweep_columns(const Labels& labels, int32_t c, const Shape& shape, const Bands& bands) {
  const int64_t in_slice = groups(shape.width, kColumns);
  torch::stable::parallel_for(
      0, shape.images * shape.depth * in_slice, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          sweep(labels, c, shape, task / in_slice, task % in_slice * kColumns, bands);
        }
      });
  labels.check();
}

// Passes the two nearest objects of class `c` of every pixel to `sink`, row by row.
template <typename D, typename Sink>
void search_all(const Tensor& like, const Labels& labels, int32_t c, const Shape& shape,
                const Spacing& spacing, const Bands& bands, const Sink& sink) {
  if (shape.depth == 1) {
    search_bands<D>(labels, c, shape, spacing, bands, nullptr, sink);
  } else {
    const Volumes<D> volumes(like, shape);
    search_bands<D>(labels, c, shape, spacing, bands, &volumes, sink);
    search_depth(shape, squared_size<D>(spacing.z), volumes, sink);
  }
}

// Operator two_nearest: labels (N, D, H, W), spacing along D, H and W.
std::tuple<Tensor, Tensor> two_nearest(const Tensor& labels_in,
                                       const std::vector<double>& spacing_in) {
  const Tensor input = as_contiguous(labels_in);
  const Shape shape(input);
  const Spacing spacing(spacing_in);
  const Tensor first = new_tensor(input, sizes(input), aoti_torch_dtype_float32());
  const Tensor second = new_tensor(input, sizes(input), aoti_torch_dtype_float32());
  if (shape.pixels() == 0) return {first, second};
  const Labels labels("two_nearest", input, std::nullopt, std::nullopt);
  const Distances sink{first.mutable_data_ptr<float>(), second.mutable_data_ptr<float>(),
                       spacing.unit() && longest_square(shape, spacing) <= 1 << 24};
  const Bands bands(shape);
  sweep_columns(labels, 0, shape, bands);
  if (fits_int32(shape, spacing)) {
    search_all<int32_t>(input, labels, 0, shape, spacing, bands, sink);
  } else {
    search_all<double>(input, labels, 0, shape, spacing, bands, sink);
  }
  return {first, second};
}

// The weight of each class in each image, (images, classes): `given` or, without it, balanced,
// which is pixels / (classes present x pixels of the class).
std::vector<float> weights_of_classes(const std::optional<Tensor>& given, const Shape& shape,
                                      int64_t classes, const Counts& counts) {
  std::vector<float> result(shape.images * classes);
  for (int64_t image = 0; image < shape.images; ++image) {
    int64_t total = 0, present = 0;
    for (int64_t c = 0; c < classes; ++c) {
      total += counts[image * classes + c];
      present += counts[image * classes + c] > 0 ? 1 : 0;
    }
    for (int64_t c = 0; c < classes; ++c) {
      result[image * classes + c] =
          given ? given->const_data_ptr<float>()[c]
                : balanced_weight(counts[image * classes + c], total, present);
    }
  }
  return result;
}

std::tuple<Tensor, Tensor> border_weights(
    const Tensor& labels_in, const std::optional<Tensor>& classes_in,
    const std::optional<Tensor>& foreground_in, const std::optional<Tensor>& class_weight_in,
    int64_t classes, int64_t ridge, std::optional<int64_t> ignore_label, double w0, double sigma,
    bool everywhere, double halo, double halo_sigma, const std::vector<double>& spacing) {
  const Operands in(labels_in, classes_in, foreground_in, class_weight_in);
  const Shape shape(in.labels);
  const Settings settings{classes, ridge,      ignore_label,    w0, sigma, everywhere,
                          halo,    halo_sigma, Spacing(spacing)};
  settings.check(shape, in);
  const Tensor target = new_tensor(in.labels, sizes(in.labels), aoti_torch_dtype_uint8());
  const Tensor weights = new_tensor(in.labels, sizes(in.labels), aoti_torch_dtype_float32());
  if (shape.pixels() == 0) return {target, weights};
  const Labels labels("border_weight_map", in.labels, in.classes, ignore_label);
  Counts counts(shape.images * classes);
  find_target(labels, shape, in.foreground ? in.foreground->const_data_ptr<bool>() : nullptr,
              settings, target.mutable_data_ptr<uint8_t>(), counts);
  const std::vector<float> of_classes = weights_of_classes(in.class_weight, shape, classes, counts);
  const Terms terms = settings.terms();
  // Short enough that squared distances, even a few steps beyond, can be added up in int16_t.
  const bool reach_is_short =
      settings.spacing.unit() && terms.reaches<float>().most < kMostSteps<int16_t> - 27;
  for (int32_t c = 1; c < classes; ++c) {
    const Weights sink{settings,
                       terms,
                       of_classes.data(),
                       shape.volume(),
                       c > 1,
                       target.const_data_ptr<uint8_t>(),
                       weights.mutable_data_ptr<float>()};
    const Bands bands(shape);
    sweep_columns(labels, c, shape, bands);
    if (reach_is_short && labels.highest.load() <= INT16_MAX) {
      search_all<int16_t>(in.labels, labels, c, shape, settings.spacing, bands, sink);
    } else if (fits_int32(shape, settings.spacing)) {
      search_all<int32_t>(in.labels, labels, c, shape, settings.spacing, bands, sink);
    } else {
      search_all<float>(in.labels, labels, c, shape, settings.spacing, bands, sink);
    }
  }
  return {target, weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(unet_fast, CPU, m) {
  m.impl("two_nearest", TORCH_BOX(&two_nearest));
  m.impl("separate_touching", TORCH_BOX(&separate_touching));
  m.impl("border_weights", TORCH_BOX(&border_weights));
}

}  // namespace unet_fast::border_weight_map
