#pragma once

#include "border_weight_map/target.cuh"

// Weight maps of images whose reach is short, at unit spacing and without a class map, the usual
// case of training: in three launches, with 8 bytes per pixel of scratch memory. Part of
// kernels.cuh, whose kernels take everything else.
namespace unet_fast::border_weight_map {

// ---- Keys: an object at a squared distance as one number, which orders by distance.

template <typename Key>
constexpr int kLabelBits = sizeof(Key) == 8 ? 32 : 18;
template <typename Key>
constexpr Key kOne = Key{1} << kLabelBits<Key>;  // a squared distance of 1

// The longest reach in pixels. An object further off counts as none; the sum of two squares that
// the search makes still fits 32 bits.
constexpr int32_t kMostReach = 89;
template <typename Key>
constexpr Key kNoObject = (kMostReach + 1) * (kMostReach + 1) * kOne<Key>;
static_assert(2 * (kMostReach + 1) * (kMostReach + 1) < 1 << (32 - kLabelBits<uint32_t>));

template <typename Key>
__device__ inline Key key(int32_t steps, int32_t label) {
  const int32_t near = steps <= kMostReach ? steps : kMostReach + 1;
  return static_cast<Key>(near * near) * kOne<Key> + static_cast<Key>(label);
}

template <typename Key>
__device__ inline Key least(Key a, Key b) {
  return a < b ? a : b;
}

template <typename Key>
__device__ inline bool same_label(Key a, Key b) {
  return ((a ^ b) & (kOne<Key> - 1)) == 0;
}

// The nearest two distinct objects of a pixel.
template <typename Key>
struct alignas(2 * sizeof(Key)) Keys {
  Key first, second;

  static __device__ Keys none() { return {kNoObject<Key>, kNoObject<Key>}; }
  // The nearest object but that of `key`.
  __device__ Key other_than(Key key) const { return same_label(first, key) ? second : first; }
  __device__ void add(Key key) {
    const Key farther = first < key ? key : first;
    second = same_label(first, key) ? second : least(second, farther);
    first = least(first, key);
  }
};

// What the sweep notes for the search, by image.
struct Notes {
  unsigned pixels[2];  // of background and of objects
  unsigned wide;       // whether a label does not fit a 32-bit key
};

// ---- The sweep of columns, which also writes targets

// Rows that a thread sweeps, and keeps in registers.
constexpr int kRows = 24;
static_assert(kRows < 32, "they are the bits of an integer");

// An image of labels.
template <typename Id>
struct Plane {
  const Id* labels;
  int32_t height, width;
  Id background;  // the ignored label, which is no object, or 0

  __device__ Id id(int32_t y, int32_t x) const { return labels[y * width + x]; }
  // 0 where ignored.
  __device__ Id object(int32_t y, int32_t x) const {
    const Id found = id(y, x);
    return found == background ? Id{0} : found;
  }
  __device__ bool on_ridge(Ridge ridge, int32_t y, int32_t x) const {
    const int32_t here = static_cast<int32_t>(object(y, x));
    bool result = false;
#pragma unroll
    for (int dy = -1; dy <= 1; ++dy) {
#pragma unroll
      for (int dx = -1; dx <= 1; ++dx) {
        if (!in_ridge(ridge, 0, dy, dx) || y + dy < 0 || y + dy >= height || x + dx < 0 ||
            x + dx >= width) {
          continue;
        }
        result |= touches(here, static_cast<int32_t>(object(y + dy, x + dx)));
      }
    }
    return result;
  }
};

// The first n rows, by bit, for which `is` holds.
template <typename Is>
__device__ uint32_t rows_where(int32_t n, Is is) {
  uint32_t rows = 0;
  for (int32_t k = 0; k < n; ++k) rows |= (is(k) ? 1u : 0u) << k;
  return rows;
}

// Writes the two nearest objects within each column, the targets and the notes of an image; a
// thread has kRows rows of a column, and reads `reach` more above and below.
template <typename Id>
__global__ void __launch_bounds__(kThreads, 2)
    sweep_packed(Labels labels, const bool* foreground, int64_t ridge, int32_t reach,
                 Keys<uint32_t>* nearest, uint8_t* target, Notes* notes) {
  using Unsigned = std::conditional_t<sizeof(Id) == 8, uint64_t, uint32_t>;
  __shared__ unsigned sums[kThreads / kWarp];
  const int32_t x = static_cast<int32_t>(blockIdx.x * kThreads + threadIdx.x);
  const int32_t top = static_cast<int32_t>(blockIdx.y) * kRows;
  const int32_t height = static_cast<int32_t>(labels.height);
  const int32_t width = static_cast<int32_t>(labels.width);
  const int32_t left = height - top;
  const int32_t n = x >= width ? 0 : left < kRows ? left : kRows;  // rows of this thread
  const int32_t image = static_cast<int32_t>(blockIdx.z) * height * width;
  const int32_t from = image + top * width + x;
  const bool ignores =
      labels.ignores && static_cast<Id>(labels.ignore_label) == labels.ignore_label;
  const Id ignored = ignores ? static_cast<Id>(labels.ignore_label) : Id{0};
  const Plane<Id> plane{static_cast<const Id*>(labels.data) + image, height, width, ignored};
  Keys<uint32_t> found[kRows];
  uint32_t cells = 0, skipped = 0;
  Unsigned most = 0;
  if (n > 0) {
    Met down;
#pragma unroll 8
    for (int32_t y = top < reach ? 0 : top - reach; y < top; ++y) {
      down.meet(static_cast<int32_t>(plane.object(y, x)), y);
    }
#pragma unroll
    for (int32_t k = 0; k < kRows; ++k) {
      const Id object = k < n ? plane.object(top + k, x) : Id{0};
      const Unsigned value = static_cast<Unsigned>(object);
      most = most < value ? value : most;
      cells |= (object != 0 ? 1u : 0u) << k;
      down.meet(static_cast<int32_t>(object), top + k);
      found[k] = {key<uint32_t>(top + k - down.at, down.label),
                  key<uint32_t>(top + k - down.other_at, down.other)};
    }
    if (foreground != nullptr) {
      cells = rows_where(n, [&](int32_t k) { return foreground[from + k * width]; });
    } else if (ridge == kTwoSided) {
      cells &= ~rows_where(n, [&](int32_t k) { return plane.on_ridge(kTwoSided, top + k, x); });
    } else if (ridge == kOneSided) {
      cells &= ~rows_where(n, [&](int32_t k) { return plane.on_ridge(kOneSided, top + k, x); });
    }
    if (ignores) {
      skipped = rows_where(n, [&](int32_t k) { return plane.id(top + k, x) == ignored; });
    }
    Met up;
#pragma unroll 8
    for (int32_t y = (left < kRows + reach ? height : top + kRows + reach) - 1; y >= top + kRows;
         --y) {
      up.meet(static_cast<int32_t>(plane.object(y, x)), -y);
    }
#pragma unroll
    for (int32_t k = kRows - 1; k >= 0; --k) {
      if (k >= n) continue;
      const int32_t y = top + k;
      up.meet(static_cast<int32_t>(plane.object(y, x)), -y);
      found[k].add(key<uint32_t>(-y - up.at, up.label));
      found[k].add(key<uint32_t>(-y - up.other_at, up.other));
      nearest[from + k * width] = found[k];
      target[from + k * width] = (skipped >> k & 1) != 0 ? kIgnored : cells >> k & 1;
    }
  }
  assert(most <= static_cast<Unsigned>(kMaxLabel) && "labels must be in [0, 2147483647]");
  if (most >= kOne<uint32_t>) atomicMax(&notes[blockIdx.z].wide, 1u);
  const uint32_t valid = ((1u << n) - 1) & ~skipped;
  // Two counts in one sum: a block has fewer than 2^16 pixels.
  const unsigned counted =
      block_sum(static_cast<unsigned>(__popc(valid & ~cells) | __popc(valid & cells) << 16), sums);
  if (threadIdx.x == 0) {
    atomicAdd(&notes[blockIdx.z].pixels[0], counted & 0xffff);
    atomicAdd(&notes[blockIdx.z].pixels[1], counted >> 16);
  }
}

// ---- The search along rows

constexpr int kRun = 512;  // pixels of a row that a block handles
constexpr int kSearchThreads = 128;
constexpr int kStepsPerTest = 2;  // more steps than needed do no harm

// What the search takes and writes.
struct PackedMap {
  int32_t reach;          // in pixels, rounded up
  int32_t nearest_limit;  // the squared distance below which the nearest object counts
  float extent;           // of the border term: the sum of distances up to which it counts
  Terms terms;
  bool everywhere, balanced;
  float class_weights[2];
  const float* given;  // class weights on the device, or null
  const uint8_t* target;
  float* out;

  __device__ float class_weight(int c, const Notes& notes) const {
    if (!balanced)
      return given != nullptr ? given[c] : c == 0 ? class_weights[0] : class_weights[1];
    const int64_t background = notes.pixels[0], objects = notes.pixels[1];
    return balanced_weight(c == 0 ? background : objects, background + objects,
                           (background > 0 ? 1 : 0) + (objects > 0 ? 1 : 0));
  }
};

template <typename Key>
__device__ float distance(Key key) {
  // Squares below 2^24: sqrt in float gives the same digits as in double.
  const float square = static_cast<float>(static_cast<uint32_t>(key / kOne<Key>));
  return root(key < kNoObject<Key> ? square : kInfinity);
}

// The least of `best` and of what `take` gives for pixels on both sides of `here`, farther by their
// squared steps; ends where no further one can be below it, or below `limit`.
template <typename Key, typename Take>
__device__ Key search_both_sides(const Keys<Key>* here, Key best, Key limit, Take take) {
  const Keys<Key>*left = here, *right = here;
  Key near = kOne<Key>, odd = 3 * kOne<Key>;
  while (near < least(best, limit)) {
#pragma unroll
    for (int k = 0; k < kStepsPerTest; ++k) {
      best = least(best, least(take(*--left), take(*++right)) + near);
      near += odd;
      odd += 2 * kOne<Key>;
    }
  }
  return best;
}

// The weight of a background pixel (or, everywhere, of any), whose column keeps *here: first the
// nearest object of all is found, then the nearest other one.
template <typename Key>
__device__ float weight_at(const PackedMap& map, const Keys<Key>* here, float weight, bool halo) {
  const Key first =
      search_both_sides(here, here->first, static_cast<Key>(map.nearest_limit) * kOne<Key>,
                        [](Keys<Key> at) { return at.first; });
  const float d1 = distance(first), left = map.extent - d1;
  if (d1 <= left) {
    const Key second = search_both_sides(here, here->other_than(first),
                                         static_cast<Key>(left * left + 1) * kOne<Key>,
                                         [&](Keys<Key> at) { return at.other_than(first); });
    weight += map.terms.border(d1 + distance(second));
  }
  return halo ? weight + map.terms.halo(d1) : weight;
}

// Writes the weights of n pixels of a row, from x on. `column(x)` is what the column of a pixel
// keeps; `row` and `list` are memory of the block.
template <typename Key, typename Column>
__device__ void search_run(const PackedMap& map, int32_t from, int32_t x, int32_t width,
                           const float* class_weights, Column column, Keys<Key>* row,
                           uint16_t* list, int* count) {
  const int32_t thread = static_cast<int32_t>(threadIdx.x), lane = thread % kWarp;
  const int32_t n = width - x < kRun ? width - x : kRun;
  for (int32_t i = thread; i < n + 2 * map.reach; i += kSearchThreads) {
    const int32_t at = x + i - map.reach;
    row[i] = at < 0 || at >= width ? Keys<Key>::none() : column(at);
  }
  if (thread == 0) *count = 0;
  __syncthreads();
  // Lists the pixels that need a search, so that no lane of a warp idles for others.
  const uint8_t* const target = map.target + from + x;
  float* const out = map.out + from + x;
  for (int32_t first = 0; first < n; first += kSearchThreads) {
    const int32_t i = first + thread;
    const uint8_t c = i < n ? target[i] : kIgnored;
    const bool needed = gets_border(c, map.everywhere);
    if (i < n && !needed) out[i] = c == kIgnored ? 0.0f : class_weights[1];
    const unsigned votes = __ballot_sync(~0u, needed);
    int before = 0;
    if (lane == 0) before = atomicAdd(count, __popc(votes));
    before = __shfl_sync(~0u, before, 0) + __popc(votes & ((1u << lane) - 1));
    if (needed) list[before] = static_cast<uint16_t>(i);
  }
  __syncthreads();
  const bool halo = map.terms.halo.height > 0;
  for (int32_t k = thread; k < *count; k += kSearchThreads) {
    const int32_t i = list[k];
    const bool background = !map.everywhere || target[i] == 0;
    out[i] =
        weight_at(map, row + map.reach + i, class_weights[background ? 0 : 1], halo && background);
  }
}

__global__ void __launch_bounds__(kSearchThreads)
    search_packed(Labels labels, const Keys<uint32_t>* nearest, const Notes* notes, PackedMap map) {
  __shared__ Keys<uint64_t> row[kRun + 2 * kMostReach];
  __shared__ uint16_t list[kRun];
  __shared__ int count;
  __shared__ float class_weights[2];
  const int32_t x = static_cast<int32_t>(blockIdx.x) * kRun, y = static_cast<int32_t>(blockIdx.y);
  const int32_t height = static_cast<int32_t>(labels.height);
  const int32_t width = static_cast<int32_t>(labels.width);
  const int32_t from = (static_cast<int32_t>(blockIdx.z) * height + y) * width;
  const Notes& of_image = notes[blockIdx.z];
  if (threadIdx.x < 2) {
    class_weights[threadIdx.x] = map.class_weight(static_cast<int>(threadIdx.x), of_image);
  }
  if (of_image.wide == 0) {
    const auto column = [&](int32_t at) { return nearest[from + at]; };
    search_run<uint32_t>(map, from, x, width, class_weights, column,
                         reinterpret_cast<Keys<uint32_t>*>(row), list, &count);
    return;
  }
  // Some label of the image does not fit 32-bit keys: they are made anew, of 64 bits.
  const auto column = [&](int32_t at) {
    auto found = Keys<uint64_t>::none();
    for (int32_t dy = -map.reach; dy <= map.reach; ++dy) {
      if (y + dy < 0 || y + dy >= height) continue;
      const int32_t object = labels.object(from + dy * width + at, 0);
      if (object != 0) found.add(key<uint64_t>(dy < 0 ? -dy : dy, object));
    }
    return found;
  };
  search_run<uint64_t>(map, from, x, width, class_weights, column, row, list, &count);
}

// ---- Launches

/// Whether the packed kernels take a map: an image at unit spacing, without a class map, in which
/// objects matter within kMostReach. Grids have at most 65535 blocks along the axes of rows and
/// images.
inline bool packs(const Labels& labels, const MapSettings& settings) {
  const double (&size)[3] = settings.spacing;
  return labels.depth == 1 && labels.classes == nullptr && size[1] == 1 && size[2] == 1 &&
         settings.terms.reaches<int32_t>().most < kMostReach && labels.height <= 65535 &&
         labels.images <= 65535 && labels.pixels() < INT32_MAX;  // pixels are counted in 32 bits
}

/// Writes targets and weights of maps that pack. `notes` has room for one value per image,
/// `nearest` for one per pixel.
template <typename Stream>
void launch_packed(const Labels& labels, const bool* foreground, const MapSettings& settings,
                   Notes* notes, Keys<uint32_t>* nearest, uint8_t* target, float* weights,
                   Stream stream) {
  const auto reaches = settings.terms.reaches<int32_t>();
  const auto blocks = [](int64_t n, int64_t in_block) {
    return static_cast<unsigned>((n + in_block - 1) / in_block);
  };
  const unsigned images = static_cast<unsigned>(labels.images);
  const PackedMap map{static_cast<int32_t>(reaches.most) + 1,
                      std::max(reaches.last.first, reaches.last.half),
                      static_cast<float>(settings.terms.border.extent),
                      settings.terms,
                      settings.everywhere,
                      settings.balanced,
                      {settings.class_weights.at[0], settings.class_weights.at[1]},
                      settings.given,
                      target,
                      weights};
  const int64_t n = labels.images * static_cast<int64_t>(sizeof(Notes) / sizeof(unsigned));
  launch(&clear<unsigned>, blocks_of(n), kThreads, stream, reinterpret_cast<unsigned*>(notes), n);
  with_integer_type(labels.type, [&]<typename Id>() {
    launch(&sweep_packed<Id>,
           dim3(blocks(labels.width, kThreads), blocks(labels.height, kRows), images), kThreads,
           stream, labels, foreground, settings.ridge, map.reach, nearest, target, notes);
  });
  launch(&search_packed,
         dim3(blocks(labels.width, kRun), static_cast<unsigned>(labels.height), images),
         kSearchThreads, stream, labels, nearest, notes, map);
}

}  // namespace unet_fast::border_weight_map
