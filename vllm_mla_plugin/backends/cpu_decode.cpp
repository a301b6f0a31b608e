// MLA decode on CPU: multi-query attention on paged latents, all sequences of a batch at once.
//
// Compiled for one model by cpu_kernel.py, which defines HEADS, LATENT, ROPE and SCALAR (the type of query, cache and
// output: float, _Float16, or Bfloat16), and for packed rows what cpu_rows.h asks for. Everything is computed in
// float32; one pass over the cache (online softmax, Milakov and Gimelshein 2018), whose rows are keys and, in their
// first LATENT numbers, values.

#include <algorithm>
#include <cmath>
#include <iterator>
#include <memory>

#include "cpu_numbers.h"
#ifdef PIECES
#include "cpu_rows.h"
#endif

namespace {

constexpr int largest_divisor(int of, int limit) {
  while (of % limit) limit--;
  return limit;
}

constexpr int WIDTH = LATENT + ROPE;
constexpr int STEPS = (WIDTH + LANES - 1) / LANES;
constexpr int VALUE_STEPS = (LATENT + LANES - 1) / LANES;
constexpr int TILE = 32;     // cached tokens per step: their float32 copies stay in the nearest caches
constexpr int CHUNK = 1024;  // cached tokens per task: long contexts are shared among threads
static_assert(CHUNK % TILE == 0 && TILE % LANES == 0, "tiles fill chunks, vectors fill tiles");
// Block sizes whose accumulators fit into 32 vector registers.
constexpr int ROWS = largest_divisor(HEADS, std::min(HEADS, 9));
constexpr int TOKENS = 2;
constexpr int COLUMNS = largest_divisor(VALUE_STEPS, std::min(VALUE_STEPS, 18 / ROWS));

// e ** x for x <= 0, to float32 rounding; below -87, where the true value is no normal number, at most 2e-38.
Vec exp_of(Vec x) {
  Vec lowest = Vec{} - 87.0f;
  x = x > lowest ? x : lowest;
  IntVec whole = __builtin_convertvector(x * 1.44269504f - 0.5f, IntVec);  // of x / ln 2, rounded to nearest
  Vec n = __builtin_convertvector(whole, Vec);
  Vec f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: the difference stays exact
  Vec sum = 1.0f / 720 * f + 1.0f / 120;
  sum = sum * f + 1.0f / 24;
  sum = sum * f + 1.0f / 6;
  sum = sum * f + 0.5f;
  sum = sum * f + 1.0f;
  sum = sum * f + 1.0f;
  IntVec power = (whole + 127) << 23;
  Vec scale;
  memcpy(&scale, &power, sizeof scale);
  return sum * scale;
}

// Sums of 16 vectors, one in each lane: a tree that halves the vectors and doubles the sums they hold.
Vec sums(Vec* v) {
  const IntVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int half = LANES / 2; half; half /= 2) {
    // Lanes whose bit `half` is set take from the second operand; `own` keeps such a lane's half, `other` its partner.
    IntVec second = (lane & half) != 0;
    IntVec own = lane + (second & LANES);
    IntVec other = (lane ^ half) + (second & LANES);
    for (int i = 0; i < half; i++) {
      v[i] = __builtin_shuffle(v[i], v[i + half], own) + __builtin_shuffle(v[i], v[i + half], other);
    }
  }
  return v[0];
}

// What one thread works on. Heads are rows everywhere.
struct alignas(64) Work {
  Vec query[HEADS][STEPS];
  Vec keys[TILE][STEPS];
  Vec partial[ROWS][TILE];
#ifdef PIECES
  Row rows[TILE];
  float turned[TILE][ROPE + LANES];
#endif
  float weights[HEADS][TILE];
  Vec output[HEADS][VALUE_STEPS];
  float top[HEADS];    // largest score so far
  float total[HEADS];  // sum of exp(score - top)
};

void scores(Work& work) {
  for (int head = 0; head < HEADS; head += ROWS) {
    for (int token = 0; token < TILE; token += TOKENS) {
      Vec sum[ROWS][TOKENS] = {};
      for (int step = 0; step < STEPS; step++)
        for (int i = 0; i < ROWS; i++)
          for (int j = 0; j < TOKENS; j++) sum[i][j] += work.query[head + i][step] * work.keys[token + j][step];
      for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < TOKENS; j++) work.partial[i][token + j] = sum[i][j];
    }
    for (int i = 0; i < ROWS; i++)
      for (int token = 0; token < TILE; token += LANES) {
        Vec row = sums(&work.partial[i][token]);
        memcpy(&work.weights[head + i][token], &row, sizeof row);
      }
  }
}

// Scores to softmax weights relative to the largest score so far; what was summed before is rescaled.
void weigh(Work& work, int count) {
  for (int head = 0; head < HEADS; head++) {
    float* row = work.weights[head];
    std::fill(row + count, row + TILE, -INFINITY);
    float top = std::max(work.top[head], *std::max_element(row, row + TILE));
    if (top > work.top[head]) {
      float fade = std::exp(work.top[head] - top);
      for (Vec& value : work.output[head]) value *= fade;
      work.total[head] *= fade;
      work.top[head] = top;
    }
    Vec total = {};
    for (int token = 0; token < TILE; token += LANES) {
      Vec weight;
      memcpy(&weight, row + token, sizeof weight);
      weight = exp_of(weight - top);
      memcpy(row + token, &weight, sizeof weight);
      total += weight;
    }
    for (int lane = 0; lane < LANES; lane++) work.total[head] += total[lane];
  }
}

void add_values(Work& work) {
  for (int head = 0; head < HEADS; head += ROWS)
    for (int step = 0; step < VALUE_STEPS; step += COLUMNS) {
      Vec sum[ROWS][COLUMNS];
      for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLUMNS; j++) sum[i][j] = work.output[head + i][step + j];
      for (int token = 0; token < TILE; token++)
        for (int i = 0; i < ROWS; i++)
          for (int j = 0; j < COLUMNS; j++) sum[i][j] += work.weights[head + i][token] * work.keys[token][step + j];
      for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLUMNS; j++) work.output[head + i][step + j] = sum[i][j];
    }
}

#ifdef PIECES
typedef uint8_t Cached;
constexpr int ROW_LENGTH = ROW;

#else
typedef SCALAR Cached;
constexpr int ROW_LENGTH = WIDTH;
#endif

// The cache of one sequence.
struct Pages {
  const Cached* cache;
  const int32_t* table;
  int64_t block_stride;
  int block_size;

  const Cached* row(int token) const {
    return cache + table[token / block_size] * block_stride + int64_t(token % block_size) * ROW_LENGTH;
  }
};

#ifdef PIECES
// Some tokens' numbers but for the latent's mean: it changes all scores of a query by the same, which is nothing to a
// softmax, and results by itself.
void read_rows(Work& work, const Pages& pages, const float* means, int first, int count) {
  // A step for all tokens at a time, because the processor waits for what has just been written by other vectors.
  for (int token = 0; token < count; token++) memcpy(work.rows[token].bytes, pages.row(first + token), ROW);
  for (int token = 0; means && token < count; token++) Means(means).turn(first + token, work.turned[token]);
  auto numbers = [&](int token) { return reinterpret_cast<float*>(work.keys[token]); };
  for (int token = 0; token < count; token++) widen_row(work.rows[token].bytes, numbers(token), STEPS * LANES);
  for (int token = 0; means && token < count; token++)
    Means(means).add_to(numbers(token), work.turned[token], first + token);
}
#else
void read_rows(Work& work, const Pages& pages, const float*, int first, int count) {
  for (int token = 0; token < count; token++)
    widen(pages.row(first + token), reinterpret_cast<float*>(work.keys[token]), WIDTH);
}
#endif

void attend(Work& work, const Pages& pages, const float* means, int first, int last) {
  for (; first < last; first += TILE) {
    int count = std::min(TILE, last - first);
    read_rows(work, pages, means, first, count);
    // No weight of zero removes what another sequence may have left here, should it be NaN.
    memset(work.keys[count], 0, sizeof work.keys[0] * (TILE - count));
    // Pages lie anywhere in memory, which the processor does not foresee.
    for (int token = first + TILE; token < std::min(first + 2 * TILE, last); token++) {
      const char* next = reinterpret_cast<const char*>(pages.row(token));
      for (size_t byte = 0; byte < ROW_LENGTH * sizeof(Cached); byte += 64) __builtin_prefetch(next + byte);
    }
    scores(work);
    weigh(work, count);
    add_values(work);
  }
}

}  // namespace

extern "C" {

// Floats of workspace for each of `sequences * chunks`.
int partial_size() { return HEADS * (VALUE_STEPS * LANES + 2); }

int chunk_size() { return CHUNK; }

// query [sequences, HEADS, WIDTH] and output [sequences, HEADS, LATENT], contiguous; the softmax scale is in `scale`.
// `means`: of packed rows, what struct Means reads, or null.
void decode(const SCALAR* query, const Cached* cache, const int32_t* tables, const int32_t* lengths, SCALAR* output,
            float* workspace, const float* means, int sequences, int chunks, int64_t table_stride,
            int64_t block_stride, int block_size, float scale) {
  constexpr int OUTPUT = VALUE_STEPS * LANES;
#pragma omp parallel
  {
    auto work = std::make_unique<Work>();  // zeroed: what pads vectors stays zero
#pragma omp for collapse(2) schedule(dynamic)
    for (int sequence = 0; sequence < sequences; sequence++) {
      for (int chunk = 0; chunk < chunks; chunk++) {
        int first = chunk * CHUNK, last = std::min(lengths[sequence], first + CHUNK);
        if (first >= last) continue;
        for (int head = 0; head < HEADS; head++) {
          float* row = reinterpret_cast<float*>(work->query[head]);
          widen(query + (int64_t(sequence) * HEADS + head) * WIDTH, row, WIDTH);
          for (int i = 0; i < WIDTH; i++) row[i] *= scale;
          std::fill(std::begin(work->output[head]), std::end(work->output[head]), Vec{});
          work->top[head] = -INFINITY;
          work->total[head] = 0;
        }
        attend(*work, {cache, tables + sequence * table_stride, block_stride, block_size}, means, first, last);
        float* partial = workspace + (int64_t(sequence) * chunks + chunk) * HEADS * (OUTPUT + 2);
        memcpy(partial, work->output, sizeof work->output);
        memcpy(partial + HEADS * OUTPUT, work->top, sizeof work->top);
        memcpy(partial + HEADS * (OUTPUT + 1), work->total, sizeof work->total);
      }
    }
#pragma omp for collapse(2)
    for (int sequence = 0; sequence < sequences; sequence++) {
      for (int head = 0; head < HEADS; head++) {
        const float* first = workspace + int64_t(sequence) * chunks * HEADS * (OUTPUT + 2);
        int used = (lengths[sequence] + CHUNK - 1) / CHUNK;
        auto partial = [&](int chunk) { return first + int64_t(chunk) * HEADS * (OUTPUT + 2); };
        float top = -INFINITY, total = 0, sum[OUTPUT] = {};
        for (int chunk = 0; chunk < used; chunk++) top = std::max(top, partial(chunk)[HEADS * OUTPUT + head]);
        for (int chunk = 0; chunk < used; chunk++) {
          float fade = std::exp(partial(chunk)[HEADS * OUTPUT + head] - top);
          total += fade * partial(chunk)[HEADS * (OUTPUT + 1) + head];
          for (int i = 0; i < LATENT; i++) sum[i] += fade * partial(chunk)[head * OUTPUT + i];
        }
        for (int i = 0; i < LATENT; i++) {
          // Sequences of length 0 pad a batch.
          float result = used ? sum[i] / total : 0.0f;
#ifdef PIECES
          if (used && means) result += Means(means).latent[i];
#endif
          narrow(result, output + (int64_t(sequence) * HEADS + head) * LATENT + i);
        }
      }
    }
  }
}
}
