// Draws as draw.cu does, from what top-k, top-p and min-p keep. The chunks of the rows are there.
//
// filter_kernel: a block for each row. What a filter keeps is what lies at or above a border in the order of (value, id). A border
//   is the first value, from the smallest, at which a sum passes a limit: of ones for top-k, of probabilities for top-p. Most of a
//   row lies far below: the k-th largest of the chunks' maxima bounds the k-th largest value, and what is less probable than
//   (1 - p) / 2 V goes as a whole. What is left over goes to a list in shared memory and is sorted there. Where the list is too
//   short, sums over 2,048 ranges of values show in which of them the border lies, and that one is looked at next.
//   Sums are integers, in units of 2^-43, so that their order does not matter and every call has the same bits; 2^20 values are the
//   most. Probabilities are f32 exponentials, which are within two units in the last place here and on the host, so a cumulative
//   probability is the host's up to 4e-7 of itself and 1e-7: only a token whose cumulative probability lies so near to the limit may
//   be kept here and not there. Bound: bytes of the chunks in which something is kept, at a multiprocessor's rate; the row once more
//   where that is all of them.
#include "draw.cuh"

namespace {

constexpr int FILTER_THREADS = 1024, FILTER_WARPS = FILTER_THREADS / 32, LIST = 4096, BINS = 2048, MOST_CHUNKS = 2048;

// Sums are of ones, or of weights in parts of UNIT.
constexpr float UNIT = 8796093022208.0f; // 2^43
constexpr int LOW_BITS = 12;             // 2^20 values below 2^12 have a sum below 2^32

// Orders values as integers; 0 and -0 are one.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x == 0.0f ? 0.0f : x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// What a border is looked for by: the number of values, or their probabilities among those with a sum of weights of 1 / inverse.
struct Search {
  bool is_count;
  float largest, inverse;
  Units most; // ones
  float limit;

  __device__ __forceinline__ Units units(float probability) const { return __float2ull_rn(probability * UNIT); }
  __device__ __forceinline__ Units measure(float x) const { return is_count ? 1 : units(expf(x - largest) * inverse); }
  __device__ __forceinline__ bool is_passed(Units sum) const {
    return is_count ? sum > most : static_cast<float>(static_cast<double>(sum) / static_cast<double>(UNIT)) > limit;
  }
};

// A block's shared memory.
struct Shared {
  union {
    unsigned long long list[LIST]; // value and id, in the order of both
    struct {
      uint32_t high[BINS], low[BINS];
    } bins;
    Units sums[MOST_CHUNKS]; // of each chunk
  };
  float largest_of[MOST_CHUNKS]; // of each chunk
  double doubles[FILTER_WARPS];
  Units units[FILTER_WARPS];
  Units rest;
  float numbers[FILTER_WARPS];
  int found, first, last;
};

// A row that is filtered, by a block.
struct Filter {
  const Draw &d;
  Shared &s;
  const Source source;
  const Chunk *chunks;
  const int count; // chunks
  const float largest;

  __device__ Units total_of(Units own) const {
    Units all;
    before(own, all, s.units);
    return all;
  }

  // A chunk's values, in the lanes of a warp; NaN beyond the last.
  __device__ __forceinline__ void load(float (&v)[EACH], int chunk) const {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int at = chunk * DRAW_CHUNK + i * 32 + static_cast<int>(threadIdx.x % 32);
      v[i] = at < d.vocabulary ? source.value(d, at) : NAN;
    }
  }

  // Puts what lies from `low` to `high` into the list, as much as fits, and returns how much there is; adds what lies below of the
  // whole row to `below`.
  __device__ int gather(const Search &search, uint32_t low, uint32_t high, Units *below) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();
    if (threadIdx.x == 0) s.found = 0;
    __syncthreads();
    Units under = 0;
    for (int chunk = warp; chunk < count; chunk += FILTER_WARPS) {
      const float top = s.largest_of[chunk];
      if (key_of(top) < low) {
        if (below && lane == 0) {
          const int values = min(DRAW_CHUNK, d.vocabulary - chunk * DRAW_CHUNK);
          under += search.is_count ? values : search.units(chunks[chunk].sum * expf(top - largest) * search.inverse);
        }
        continue;
      }
      float v[EACH];
      load(v, chunk);
#pragma unroll
      for (int i = 0; i < EACH; i++) {
        const uint32_t at = chunk * DRAW_CHUNK + i * 32 + lane, key = key_of(v[i]);
        const bool is_there = at < d.vocabulary, is_in = is_there && key >= low && key <= high;
        const unsigned in = __ballot_sync(0xffffffffu, is_in);
        if (in) {
          int first = 0;
          if (lane == 0) first = atomicAdd(&s.found, __popc(in));
          first = __shfl_sync(0xffffffffu, first, 0) + __popc(in & ((1u << lane) - 1));
          if (is_in && first < LIST) s.list[first] = static_cast<unsigned long long>(key) << 32 | at;
        }
        if (below && is_there && key < low) under += search.measure(v[i]);
      }
    }
    if (below) *below += total_of(under);
    __syncthreads();
    return s.found;
  }

  // Sorts the first `n` of the list, up to the next power of 2 of which it is filled.
  __device__ void sort(int n) const {
    int size = 1;
    while (size < n) size *= 2;
    for (int i = n + threadIdx.x; i < size; i += FILTER_THREADS) s.list[i] = ~0ull;
    for (int run = 2; run <= size; run *= 2) {
      for (int gap = run / 2; gap > 0; gap /= 2) {
        __syncthreads();
        for (int pair = threadIdx.x; pair < size / 2; pair += FILTER_THREADS) {
          const int one = (pair & ~(gap - 1)) * 2 + (pair & (gap - 1)), other = one + gap;
          const unsigned long long a = s.list[one], b = s.list[other];
          if ((a > b) == ((one & run) == 0)) {
            s.list[one] = b;
            s.list[other] = a;
          }
        }
      }
    }
    __syncthreads();
  }

  // The first of a sorted list of `n` at which the sum passes the limit; the last if none does.
  __device__ unsigned long long border_in_list(const Search &search, int n, Units below) const {
    const int each = (n + FILTER_THREADS - 1) / FILTER_THREADS;
    const int first = min(static_cast<int>(threadIdx.x) * each, n), end = min(first + each, n);
    auto measured = [&](int i) { return search.measure(value_of(static_cast<uint32_t>(s.list[i] >> 32))); };
    Units own = 0, all;
    for (int i = first; i < end; i++) own += measured(i);
    if (threadIdx.x == 0) s.first = n - 1;
    Units sum = below + before(own, all, s.units);
    for (int i = first; i < end; i++) {
      sum += measured(i);
      if (search.is_passed(sum)) {
        atomicMin(&s.first, i);
        break;
      }
    }
    __syncthreads();
    return s.list[s.first];
  }

  // The sums of a measure over each chunk that has something from `low` on, and of all.
  template <typename Measure> __device__ Units sum_chunks(uint32_t low, Measure measure) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();
    Units all = 0;
    for (int chunk = warp; chunk < count; chunk += FILTER_WARPS) {
      Units sum = 0;
      if (key_of(s.largest_of[chunk]) >= low) {
        float v[EACH];
        load(v, chunk);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
          const uint32_t at = chunk * DRAW_CHUNK + i * 32 + lane;
          if (at < d.vocabulary) sum += measure(v[i], at);
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      }
      if (lane == 0) {
        s.sums[chunk] = sum;
        all += sum;
      }
    }
    return total_of(all);
  }

  // After `sum_chunks`: the first id at which the sum passes `target`, which is below the sum of all.
  template <typename Measure> __device__ int locate(Measure measure, Units target) const {
    const int each = (count + FILTER_THREADS - 1) / FILTER_THREADS;
    const int first = min(static_cast<int>(threadIdx.x) * each, count), end = min(first + each, count);
    Units own = 0, all;
    for (int i = first; i < end; i++) own += s.sums[i];
    Units sum = before(own, all, s.units);
    for (int i = first; i < end; i++) {
      if (sum <= target && target < sum + s.sums[i]) {
        s.found = i;
        s.rest = target - sum;
      }
      sum += s.sums[i];
    }
    __syncthreads();
    const int at = s.found * DRAW_CHUNK + threadIdx.x;
    const Units mine = threadIdx.x < DRAW_CHUNK && at < d.vocabulary ? measure(source.value(d, at), at) : 0;
    const Units here = before(mine, all, s.units);
    if (here <= s.rest && s.rest < here + mine) s.first = at;
    __syncthreads();
    return s.first;
  }

  // Of more equal values than the list holds, `n` of them: the first at which the sum passes the limit.
  __device__ unsigned long long border_among_equals(const Search &search, uint32_t key, int n, Units below) const {
    if (search.is_count) return static_cast<unsigned long long>(key) << 32;
    const Units each = search.measure(value_of(key));
    int low = 0, high = n - 1; // the place of the first that passes it, or of the last
    while (low < high) {
      const int middle = (low + high) / 2;
      if (search.is_passed(below + (middle + 1) * each)) high = middle;
      else low = middle + 1;
    }
    auto is_equal = [&](float x, int) { return key_of(x) == key ? Units{1} : Units{0}; };
    sum_chunks(key, is_equal);
    return static_cast<unsigned long long>(key) << 32 | locate(is_equal, low);
  }

  // In which range of 2^shift values from `low` on the sum passes the limit (the last that has a sum if in none), and the sum before.
  __device__ int range(const Search &search, uint32_t low, uint32_t high, int shift, Units &below) const {
    const int warp = threadIdx.x / 32;
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += FILTER_THREADS) s.bins.high[i] = s.bins.low[i] = 0;
    if (threadIdx.x == 0) s.first = BINS, s.last = 0;
    __syncthreads();
    for (int chunk = warp; chunk < count; chunk += FILTER_WARPS) {
      if (key_of(s.largest_of[chunk]) < low) continue;
      float v[EACH];
      load(v, chunk);
#pragma unroll
      for (int i = 0; i < EACH; i++) {
        const uint32_t at = chunk * DRAW_CHUNK + i * 32 + threadIdx.x % 32, key = key_of(v[i]);
        if (at >= d.vocabulary || key < low || key > high) continue;
        const Units sum = search.measure(v[i]);
        const uint32_t bin = (key - low) >> shift, upper = static_cast<uint32_t>(sum >> LOW_BITS);
        if (upper) atomicAdd(&s.bins.high[bin], upper);
        atomicAdd(&s.bins.low[bin], static_cast<uint32_t>(sum & ((1 << LOW_BITS) - 1)));
      }
    }
    __syncthreads();
    constexpr int EACH_BINS = BINS / FILTER_THREADS;
    auto in = [&](int bin) { return (static_cast<Units>(s.bins.high[bin]) << LOW_BITS) + s.bins.low[bin]; };
    const int first = threadIdx.x * EACH_BINS;
    Units own = 0, all;
    for (int i = 0; i < EACH_BINS; i++) own += in(first + i);
    const Units sum = below + before(own, all, s.units);
    Units passed = sum;
    for (int i = 0; i < EACH_BINS; i++) {
      passed += in(first + i);
      if (search.is_passed(passed)) atomicMin(&s.first, first + i);
      if (in(first + i)) atomicMax(&s.last, first + i);
    }
    __syncthreads();
    const int chosen = s.first < BINS ? s.first : s.last;
    passed = sum;
    for (int i = 0; i < EACH_BINS; i++) {
      if (first + i == chosen) s.rest = passed;
      passed += in(first + i);
    }
    __syncthreads();
    below = s.rest;
    return chosen;
  }

  // The first of (value, id), from the smallest, at which the sum passes the limit, or the largest. Nothing below `low` is it; of
  // the row below, sums count if they are to.
  __device__ unsigned long long border(const Search &search, uint32_t low, bool counts_below) const {
    uint32_t high = key_of(largest);
    Units below = 0;
    int n = gather(search, low, high, counts_below ? &below : nullptr);
    while (n > LIST && low < high) {
      // As many ranges as there are bins, or fewer.
      int shift = 0;
      while ((high - low) >> shift >= BINS) shift++;
      const uint32_t first = static_cast<uint32_t>(range(search, low, high, shift, below)) << shift;
      low += first;
      high = min(high, low + ((1u << shift) - 1));
      n = gather(search, low, high, nullptr);
    }
    if (n > LIST) return border_among_equals(search, low, n, below);
    sort(n);
    return border_in_list(search, n, below);
  }

  // Of what lies from a border on: the sum of weights.
  __device__ double weight_from(unsigned long long border) const {
    const Units all = sum_chunks(static_cast<uint32_t>(border >> 32), [&](float x, uint32_t at) {
      const bool is_kept = (static_cast<unsigned long long>(key_of(x)) << 32 | at) >= border;
      return is_kept ? __float2ull_rn(expf(x - largest) * UNIT) : 0;
    });
    return static_cast<double>(all) / static_cast<double>(UNIT);
  }
};

// The least weight whose probability, rounded to f32, is at least `least`.
__device__ float least_weight(double sum, float least) {
  auto is_enough = [&](float weight) { return static_cast<float>(static_cast<double>(weight) / sum) >= least; };
  float weight = static_cast<float>(static_cast<double>(least) * sum);
  while (weight > 0.0f && is_enough(__uint_as_float(__float_as_uint(weight) - 1))) weight = __uint_as_float(__float_as_uint(weight) - 1);
  while (!is_enough(weight)) weight = __uint_as_float(__float_as_uint(weight) + 1);
  return weight;
}

__global__ void __launch_bounds__(FILTER_THREADS) filter_kernel(const __grid_constant__ Draw d) {
  __shared__ Shared s;
  launch_dependents();
  wait_for_dependency();
  const int row = blockIdx.x, count = chunks_of(d);
  const uint2 place = d.rows[row];
  if (place.y == 0) return;
  const uint32_t step = d.steps[row];
  const Chunk *chunks = d.chunks + static_cast<int64_t>(row) * count;
  const Row all(chunks, count, s.doubles, s.numbers);
  const Row plain = d.penalty == 1.0f ? all : Row(d.plain + static_cast<int64_t>(row) * count, count, s.doubles, s.numbers);
  if (!all.is_usable() || !plain.is_usable()) {
    if (threadIdx.x == 0) take(d, row, place, step, 0, NAN, NAN);
    return;
  }
  for (int i = threadIdx.x; i < count; i += FILTER_THREADS) s.largest_of[i] = chunks[i].largest;
  __syncthreads();
  const Filter filter{d, s, Source(d, row), chunks, count, all.largest};
  const float largest = all.largest;
  const bool is_top_k = d.top_k > 0 && d.top_k < d.vocabulary, is_top_p = d.top_p < 1.0;
  unsigned long long border = 0;
  double sum = all.total;
  if (is_top_k) {
    uint32_t low = key_of(-INFINITY);
    if (d.top_k <= count) {
      for (int i = threadIdx.x; i < count; i += FILTER_THREADS)
        s.list[i] = static_cast<unsigned long long>(key_of(s.largest_of[i])) << 32 | i;
      filter.sort(count);
      low = static_cast<uint32_t>(s.list[count - d.top_k] >> 32);
    }
    const Search search{true, largest, 0.0f, static_cast<Units>(d.vocabulary - d.top_k), 0.0f};
    // All that tie with it are kept.
    border = filter.border(search, low, true) >> 32 << 32;
    if (is_top_p || d.min_p > 0.0) sum = filter.weight_from(border);
  }
  if (is_top_p) {
    const float limit = static_cast<float>(1.0 - d.top_p);
    const Search search{false, largest, static_cast<float>(1.0 / sum), 0, limit};
    // What is less probable than half of limit / V goes as a whole, and with it less than half of the limit.
    const float negligible = static_cast<float>(log(static_cast<double>(limit) * sum / (2.0 * d.vocabulary))) - 0.01f;
    const uint32_t low = is_top_k ? static_cast<uint32_t>(border >> 32) : min(key_of(largest + negligible), key_of(largest));
    border = filter.border(search, low, !is_top_k);
    if (d.min_p > 0.0) sum = filter.weight_from(border);
  }
  const float most = static_cast<float>(1.0 / sum);
  const float least = d.min_p > 0.0 ? least_weight(sum, static_cast<float>(d.min_p) * most) : 0.0f;
  uint32_t low = static_cast<uint32_t>(border >> 32);
  // A chunk has nothing if its largest is well below the least.
  if (least > 0.0f) low = max(low, min(key_of(largest + logf(least) - 0.01f), key_of(largest)));
  auto kept = [&](float x, uint32_t at) {
    const float weight = expf(x - largest);
    const bool is_kept = (static_cast<unsigned long long>(key_of(x)) << 32 | at) >= border && weight >= least;
    return is_kept ? __float2ull_rn(weight * UNIT) : 0;
  };
  const Units total = filter.sum_chunks(low, kept);
  const double uniform = d.uniforms[static_cast<int64_t>(step) * d.lanes + row];
  const Units target = min(static_cast<Units>(uniform * static_cast<double>(total)), total - 1);
  const int token = filter.locate(kept, target);
  if (threadIdx.x == 0) {
    const double weight = static_cast<double>(total) / static_cast<double>(UNIT);
    const double sampling = static_cast<double>(filter.source.value(d, token)) - largest - log(weight);
    d.found[2 * row] = border;
    d.found[2 * row + 1] = total;
    take(d, row, place, step, token, plain.logprob(filter.source.plain(d, token)), sampling);
  }
}

} // namespace

extern "C" int trainer_draw_filtered(const Draw *draw, cudaStream_t stream) {
  if (draw->lanes == 0) return 0;
  if ((draw->vocabulary + DRAW_CHUNK - 1) / DRAW_CHUNK > MOST_CHUNKS) return static_cast<int>(cudaErrorInvalidValue);
  return launch_after(filter_kernel, draw->lanes, FILTER_THREADS, 0, stream, *draw);
}
