// Stored images -> square crops of a batch: decodes the part of a JPEG that a crop covers, at the smallest DCT scale
// that is at least as large as the result, and resizes it row by row while it is in the cache.
//
// Everything after libjpeg is integer arithmetic, so vectorized and plain code give the same bits on every machine.
// The bytes are not trusted: they are compared with their checksum if the caller has one, sizes are checked against the
// caller's, libjpeg's errors return to decode(), reading stops at the end of the given memory, and pixels and scans,
// which take memory and time, have limits.

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <vector>

#include <jpeglib.h>
#include <jerror.h>

#include "baseline.h"
#include "errors.h"
#include "restarts.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAS_X86 1
#else
#define HAS_X86 0
#endif

namespace {

constexpr int kChannels = 3;
constexpr int kVerticalBits = 7;     // 255 << 7 still fits a signed 16-bit number, which multiply-add instructions take
constexpr int kHorizontalBits = 14;  // and so do the weights of the second pass
constexpr int kFineBits = 14;        // of the first pass if an output row covers many rows
constexpr int kFewTaps = 4;
constexpr int kPadding = 32;         // values that a vector load may read beyond a row
constexpr int64_t kMostPixels = 89'478'485;  // as MOST_PIXELS in data/sources/image_file.py, which gives the reason

// One image of a batch; data/decoding/native_decode.py has the same layout.
struct Request {
    const uint8_t* bytes;
    uint64_t size;
    int32_t is_jpeg;
    int32_t height, width;  // px, of the whole image
    int32_t top, left, crop_height, crop_width;
    int32_t flip;
    int32_t has_checksum;
    uint32_t checksum;      // CRC-32 of the bytes, as zlib computes it
};

struct Failure {
    char text[JMSG_LENGTH_MAX];
};

// --- the checksum ----------------------------------------------------------------------------------------------------

using Checksum = uint32_t (*)(const uint8_t* bytes, size_t size);

struct ChecksumTables {
    uint32_t of[8][256];  // of[k][b]: of the byte b with k zeros after it
};

constexpr ChecksumTables make_checksum_tables() {
    ChecksumTables tables{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t rest = byte;
        for (int bit = 0; bit < 8; ++bit) rest = rest >> 1 ^ (rest & 1 ? 0xedb88320u : 0u);
        tables.of[0][byte] = rest;
    }
    for (int k = 1; k < 8; ++k) {
        for (int byte = 0; byte < 256; ++byte) {
            const uint32_t before = tables.of[k - 1][byte];
            tables.of[k][byte] = before >> 8 ^ tables.of[0][before & 0xff];
        }
    }
    return tables;
}

constexpr ChecksumTables kChecksums = make_checksum_tables();

// `rest` is the checksum so far with its bits inverted.
uint32_t continue_checksum(uint32_t rest, const uint8_t* bytes, size_t size) {
    const auto& of = kChecksums.of;
    for (; size >= 8; bytes += 8, size -= 8) {
        rest ^= bytes[0] | bytes[1] << 8 | bytes[2] << 16 | static_cast<uint32_t>(bytes[3]) << 24;
        rest = of[7][rest & 0xff] ^ of[6][rest >> 8 & 0xff] ^ of[5][rest >> 16 & 0xff] ^ of[4][rest >> 24] ^
               of[3][bytes[4]] ^ of[2][bytes[5]] ^ of[1][bytes[6]] ^ of[0][bytes[7]];
    }
    for (; size > 0; ++bytes, --size) rest = rest >> 8 ^ of[0][(rest ^ *bytes) & 0xff];
    return rest;
}

uint32_t checksum_plain(const uint8_t* bytes, size_t size) { return ~continue_checksum(~0u, bytes, size); }

#if HAS_X86
// Carry-less multiplication folds 64 bytes at a time, some ten times as fast as tables: V. Gopal et al., "Fast CRC
// Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel 2009, whose constants these are.
__attribute__((target("pclmul,sse4.1"))) uint32_t checksum_pclmul(const uint8_t* bytes, size_t size) {
    if (size < 64) return checksum_plain(bytes, size);
    const auto load = [](const uint8_t* from) __attribute__((target("pclmul,sse4.1"))) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    };
    const auto fold = [](__m128i sum, __m128i by, __m128i next) __attribute__((target("pclmul,sse4.1"))) {
        const __m128i low = _mm_clmulepi64_si128(sum, by, 0x00), high = _mm_clmulepi64_si128(sum, by, 0x11);
        return _mm_xor_si128(_mm_xor_si128(low, high), next);
    };
    const __m128i by_64 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4);
    const __m128i by_16 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
    const __m128i by_8 = _mm_set_epi64x(0, 0x0163cd6124);
    const __m128i polynomial = _mm_set_epi64x(0x01f7011641, 0x01db710641);
    const __m128i low_words = _mm_setr_epi32(~0, 0, ~0, 0);
    __m128i sum = _mm_xor_si128(load(bytes), _mm_cvtsi32_si128(~0));
    __m128i second = load(bytes + 16), third = load(bytes + 32), fourth = load(bytes + 48);
    for (bytes += 64, size -= 64; size >= 64; bytes += 64, size -= 64) {
        sum = fold(sum, by_64, load(bytes));
        second = fold(second, by_64, load(bytes + 16));
        third = fold(third, by_64, load(bytes + 32));
        fourth = fold(fourth, by_64, load(bytes + 48));
    }
    sum = fold(fold(fold(sum, by_16, second), by_16, third), by_16, fourth);
    for (; size >= 16; bytes += 16, size -= 16) sum = fold(sum, by_16, load(bytes));
    // 128 bits to 64, then Barrett's reduction to 32.
    sum = _mm_xor_si128(_mm_srli_si128(sum, 8), _mm_clmulepi64_si128(sum, by_16, 0x10));
    sum = _mm_xor_si128(_mm_srli_si128(sum, 4), _mm_clmulepi64_si128(_mm_and_si128(sum, low_words), by_8, 0x00));
    __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(sum, low_words), polynomial, 0x10);
    quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, low_words), polynomial, 0x00);
    const uint32_t rest = static_cast<uint32_t>(_mm_extract_epi32(_mm_xor_si128(sum, quotient), 1));
    return ~continue_checksum(rest, bytes, size);
}
#endif

Checksum choose_checksum(bool plain) {
#if HAS_X86
    if (!plain && __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1")) return checksum_pclmul;
#endif
    (void)plain;
    return checksum_plain;
}

// --- the filter ------------------------------------------------------------------------------------------------------

// Weights of one axis: output i is the sum of weights[i * stride + t] * input[first[i] + t], t < stride.
struct Filter {
    std::vector<int32_t> first;
    std::vector<int16_t> weights;
    int stride = 0;  // even, the last weights may be zero
    int bits = 0;    // weights of an output sum to 1 << bits

    int last(int i) const { return first[i] + stride - 1; }
};

// Output i of `side` covers [start + i * length / side, start + (i + 1) * length / side) of the input if that is at
// least one input pixel (area); else it interpolates between the two nearest centers within [start, start + length).
// Each weight absorbs the previous rounding error, so that the weights of an output always sum to one.
void make_filter(Filter& filter, double start, double length, int side, int bits) {
    const double ratio = length / side;
    const bool shrinks = ratio >= 1.0;
    const int taps = shrinks ? static_cast<int>(std::ceil(ratio)) + 1 : 2;
    filter.stride = (taps + 1) / 2 * 2;
    filter.bits = bits;
    filter.first.resize(side);
    filter.weights.assign(static_cast<size_t>(side) * filter.stride, 0);
    const double one = 1 << bits;
    for (int i = 0; i < side; ++i) {
        int16_t* weights = &filter.weights[static_cast<size_t>(i) * filter.stride];
        if (shrinks) {
            const double begin = start + i * ratio, end = start + (i + 1) * ratio;
            const int first = static_cast<int>(std::floor(begin));
            filter.first[i] = first;
            int before = 0;
            for (int t = 0; t < taps; ++t) {
                const double covered = std::clamp((first + t + 1 - begin) / (end - begin), 0.0, 1.0);
                const int until = t == taps - 1 ? static_cast<int>(one) : static_cast<int>(std::lround(covered * one));
                weights[t] = static_cast<int16_t>(until - before);
                before = until;
            }
        } else {
            const double center = std::clamp(start + (i + 0.5) * ratio - 0.5, start, start + length - 1);
            const int first = static_cast<int>(std::floor(center));
            filter.first[i] = first;
            weights[1] = static_cast<int16_t>(std::lround((center - first) * one));
            weights[0] = static_cast<int16_t>(one - weights[1]);
        }
    }
}

void mirror(Filter& filter) {
    const int side = static_cast<int>(filter.first.size());
    for (int i = 0; i < side / 2; ++i) {
        std::swap(filter.first[i], filter.first[side - 1 - i]);
        std::swap_ranges(&filter.weights[static_cast<size_t>(i) * filter.stride],
                         &filter.weights[static_cast<size_t>(i) * filter.stride] + filter.stride,
                         &filter.weights[static_cast<size_t>(side - 1 - i) * filter.stride]);
    }
}

// --- the two passes --------------------------------------------------------------------------------------------------

// sums[x] = sum over t of rows[t][x] * weights[t], scaled to kVerticalBits.
using VerticalPass = void (*)(const uint8_t* const* rows, const int16_t* weights, int taps, int count, int16_t* sums);
// One output row of `side` pixels from the sums.
using HorizontalPass = void (*)(const int16_t* sums, const Filter& filter, int side, uint8_t* out);

inline __attribute__((always_inline)) void add_few_rows(const uint8_t* const* rows, const int16_t* weights, int taps,
                                                       int count, int16_t* sums) {
    const uint8_t *a = rows[0], *b = rows[1];
    const int16_t wa = weights[0], wb = weights[1];
    if (taps <= 2) {
        for (int x = 0; x < count; ++x) sums[x] = static_cast<int16_t>(a[x] * wa + b[x] * wb);
        return;
    }
    const uint8_t *c = rows[2], *d = rows[3];
    const int16_t wc = weights[2], wd = weights[3];
    if (wd == 0) {
        for (int x = 0; x < count; ++x) sums[x] = static_cast<int16_t>(a[x] * wa + b[x] * wb + c[x] * wc);
        return;
    }
    for (int x = 0; x < count; ++x) sums[x] = static_cast<int16_t>(a[x] * wa + b[x] * wb + c[x] * wc + d[x] * wd);
}

inline __attribute__((always_inline)) void add_many_rows(const uint8_t* const* rows, const int16_t* weights, int taps,
                                                        int count, int16_t* sums) {
    constexpr int kChunk = 256;
    int32_t wide[kChunk];
    for (int begin = 0; begin < count; begin += kChunk) {
        const int length = std::min(kChunk, count - begin);
        for (int x = 0; x < length; ++x) wide[x] = 1 << (kFineBits - kVerticalBits - 1);
        for (int t = 0; t < taps; ++t) {
            const uint8_t* row = rows[t] + begin;
            const int32_t weight = weights[t];
            for (int x = 0; x < length; ++x) wide[x] += row[x] * weight;
        }
        for (int x = 0; x < length; ++x) sums[begin + x] = static_cast<int16_t>(wide[x] >> (kFineBits - kVerticalBits));
    }
}

inline __attribute__((always_inline)) void add_rows(const uint8_t* const* rows, const int16_t* weights, int taps,
                                                   int count, int16_t* sums) {
    if (taps <= kFewTaps) {
        add_few_rows(rows, weights, taps, count, sums);
    } else {
        add_many_rows(rows, weights, taps, count, sums);
    }
}

template <int Stride>  // 0: the filter's stride; a constant lets the compiler unroll the taps
inline void weigh_pixels(const int16_t* sums, const Filter& filter, int begin, int side, uint8_t* out) {
    constexpr int kShift = kVerticalBits + kHorizontalBits;
    const int stride = Stride ? Stride : filter.stride;
    for (int i = begin; i < side; ++i) {
        const int16_t* input = sums + static_cast<ptrdiff_t>(filter.first[i]) * kChannels;
        const int16_t* weights = &filter.weights[static_cast<size_t>(i) * stride];
        int32_t red = 1 << (kShift - 1), green = red, blue = red;
        for (int t = 0; t < stride; ++t, input += kChannels) {
            red += input[0] * weights[t];
            green += input[1] * weights[t];
            blue += input[2] * weights[t];
        }
        out[i * kChannels] = static_cast<uint8_t>(red >> kShift);
        out[i * kChannels + 1] = static_cast<uint8_t>(green >> kShift);
        out[i * kChannels + 2] = static_cast<uint8_t>(blue >> kShift);
    }
}

void vertical_plain(const uint8_t* const* rows, const int16_t* weights, int taps, int count, int16_t* sums) {
    add_rows(rows, weights, taps, count, sums);
}

void horizontal_plain(const int16_t* sums, const Filter& filter, int side, uint8_t* out) {
    if (filter.stride == 2) {
        weigh_pixels<2>(sums, filter, 0, side, out);
    } else if (filter.stride == 4) {
        weigh_pixels<4>(sums, filter, 0, side, out);
    } else {
        weigh_pixels<0>(sums, filter, 0, side, out);
    }
}

#if HAS_X86
__attribute__((target("avx2"))) void vertical_avx2(const uint8_t* const* rows, const int16_t* weights, int taps,
                                                   int count, int16_t* sums) {
    add_rows(rows, weights, taps, count, sums);
}

// Two taps of a pixel are adjacent as R G B R G B; the shuffle pairs the channels, and one multiply-add instruction
// weights and adds a pair. Each iteration computes two pixels, one in each half of a register.
__attribute__((target("avx2"))) void horizontal_avx2(const int16_t* sums, const Filter& filter, int side,
                                                     uint8_t* out) {
    constexpr int kShift = kVerticalBits + kHorizontalBits;
    const __m256i pairs = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, -1, -1, -1, -1));
    const __m256i half = _mm256_set1_epi32(1 << (kShift - 1));
    const int stride = filter.stride;
    int i = 0;
    for (; i + 3 < side; i += 2) {  // stores 2 bytes beyond its two pixels, overwritten by the next ones or the rest
        const int16_t* left = sums + static_cast<ptrdiff_t>(filter.first[i]) * kChannels;
        const int16_t* right = sums + static_cast<ptrdiff_t>(filter.first[i + 1]) * kChannels;
        const int16_t* weights = &filter.weights[static_cast<size_t>(i) * stride];
        __m256i sum = half;
        for (int t = 0; t < stride; t += 2) {
            const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(left + t * kChannels));
            const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(right + t * kChannels));
            int32_t pair_left, pair_right;
            std::memcpy(&pair_left, weights + t, sizeof pair_left);
            std::memcpy(&pair_right, weights + stride + t, sizeof pair_right);
            const __m256i values = _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1), pairs);
            const __m256i weight = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_set1_epi32(pair_left)),
                                                           _mm_set1_epi32(pair_right), 1);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(values, weight));
        }
        const __m256i shifted = _mm256_srai_epi32(sum, kShift);
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(shifted), _mm256_extracti128_si256(shifted, 1));
        const __m128i bytes = _mm_shuffle_epi8(_mm_packus_epi16(words, words),
                                               _mm_setr_epi8(0, 1, 2, 4, 5, 6, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out + i * kChannels), bytes);
    }
    weigh_pixels<0>(sums, filter, i, side, out);
}
#endif

struct Passes {
    VerticalPass vertical = vertical_plain;
    HorizontalPass horizontal = horizontal_plain;
};

Passes choose_passes(bool plain) {
#if HAS_X86
    if (!plain && __builtin_cpu_supports("avx2")) return {vertical_avx2, horizontal_avx2};
#endif
    (void)plain;
    return {};
}

// Writes each resized row as soon as the last input row that it needs is available.
class Resizer {
   public:
    explicit Resizer(Passes passes) : passes_(passes) {}

    // The crop starts at (y, x) of the input rows, and may start and end within a pixel.
    void begin(double y, double crop_height, double x, double crop_width, int columns, int side, bool flip, uint8_t* out) {
        const bool few = crop_height / side <= kFewTaps - 1;
        make_filter(down_, y, crop_height, side, few ? kVerticalBits : kFineBits);
        make_filter(across_, x, crop_width, side, kHorizontalBits);
        if (flip) mirror(across_);
        count_ = columns * kChannels;
        sums_.assign(static_cast<size_t>(std::max(columns, furthest(across_))) * kChannels + kPadding, 0);
        rows_.resize(down_.stride);
        side_ = side;
        next_ = 0;
        out_ = out;
    }

    // Rows [0, available) are at `pixels`, `pitch` bytes apart.
    void resize_ready(const uint8_t* pixels, size_t pitch, int available, bool all) {
        while (next_ < side_) {
            const int first = down_.first[next_];
            const int16_t* weights = &down_.weights[static_cast<size_t>(next_) * down_.stride];
            int needed = down_.stride;
            while (weights[needed - 1] == 0) --needed;
            if (first + needed > available && !all) return;
            // Taps of zero weight may be beyond the last row: any row will do for them.
            for (int t = 0; t < down_.stride; ++t) rows_[t] = pixels + pitch * std::min(first + t, available - 1);
            passes_.vertical(rows_.data(), weights, down_.stride, count_, sums_.data());
            passes_.horizontal(sums_.data(), across_, side_, out_ + static_cast<size_t>(next_) * side_ * kChannels);
            ++next_;
        }
    }

   private:
    static int furthest(const Filter& filter) {
        const int side = static_cast<int>(filter.first.size());
        return std::max(filter.last(0), filter.last(side - 1)) + 1;
    }

    Passes passes_;
    Filter down_, across_;
    std::vector<int16_t> sums_;
    std::vector<const uint8_t*> rows_;
    int count_ = 0, side_ = 0, next_ = 0;
    uint8_t* out_ = nullptr;
};

// --- JPEG ------------------------------------------------------------------------------------------------------------

class Decoder {
   public:
    Decoder(bool plain) : plain_(plain), resizer_(choose_passes(plain)), checksum_(choose_checksum(plain)) {
        prepare_handler(handler_);
        info_.err = &handler_.base;
        created_ = setjmp(handler_.leave) == 0;
        if (created_) jpeg_create_decompress(&info_);
        monitor_.progress_monitor = on_progress;
        info_.progress = &monitor_;
    }
    Decoder(const Decoder&) = delete;
    Decoder& operator=(const Decoder&) = delete;
    ~Decoder() {
        if (created_) jpeg_destroy_decompress(&info_);
    }

    // Write the crop of one image, side x side px, to `out`; if that fails, return false and the reason.
    bool decode(const Request& request, int side, bool exact, uint8_t* out, Failure& failure) {
        if (!plausible(request, side, failure)) return false;
        if (request.has_checksum && checksum_(request.bytes, request.size) != request.checksum) {
            return fail(failure, "its bytes are not those that were written, by their checksum");
        }
        if (!request.is_jpeg) {
            const size_t pitch = static_cast<size_t>(request.width) * kChannels;
            resizer_.begin(0, request.crop_height, 0, request.crop_width, request.crop_width, side, request.flip, out);
            resizer_.resize_ready(request.bytes + pitch * request.top + size_t{kChannels} * request.left, pitch,
                                  request.crop_height, true);
            return true;
        }
        if (!created_) return fail(failure, "libjpeg does not start: another version was compiled against");
        return decode_jpeg(request, side, exact, out, failure);
    }

   private:
    static bool fail(Failure& failure, const char* text) {
        std::snprintf(failure.text, sizeof failure.text, "%s", text);
        return false;
    }

    static bool plausible(const Request& r, int side, Failure& failure) {
        if (r.height < 1 || r.width < 1 || int64_t{r.height} * r.width > kMostPixels) {
            return fail(failure, "its size is outside of what is decoded");
        }
        if (side < 1 || r.crop_height < 1 || r.crop_width < 1 || r.top < 0 || r.left < 0 ||
            r.top > r.height - r.crop_height || r.left > r.width - r.crop_width) {
            return fail(failure, "the crop does not lie within it");
        }
        if (!r.is_jpeg && r.size != static_cast<uint64_t>(r.height) * r.width * kChannels) {
            return fail(failure, "its bytes are not as many as its pixels need");
        }
        return true;
    }

    // No local variable here may have a destructor: errors jump out of this function.
    bool decode_jpeg(const Request& r, int side, bool exact, uint8_t* out, Failure& failure) {
        if (setjmp(handler_.leave)) {
            info_.err->format_message(reinterpret_cast<j_common_ptr>(&info_), failure.text);
            jpeg_abort_decompress(&info_);
            return handler_.reason ? fail(failure, handler_.reason) : false;
        }
        info_.err->num_warnings = 0;
        handler_.reason = nullptr;
        const int scale = exact ? 1 : dct_scale(r, side);
        const Headers headers = plain_ ? Headers{} : read_headers(r.bytes, r.size);
        Window window{0, 0, r.height, r.width};
        if (headers.baseline) {
            if (headers.height != r.height || headers.width != r.width) {
                return fail(failure, "it is of another size than the file says");
            }
            window = window_around(r, scale, headers);
            scan_.open(headers, r.bytes, r.size);
            copy_headers(headers, r.bytes, window);
            jpeg_mem_src(&info_, headers_.data(), static_cast<unsigned long>(headers_.size()));
        } else {
            jpeg_mem_src(&info_, const_cast<uint8_t*>(r.bytes), static_cast<unsigned long>(r.size));
        }
        jpeg_read_header(&info_, TRUE);
        if (static_cast<int>(info_.image_height) != window.height || static_cast<int>(info_.image_width) != window.width) {
            jpeg_abort_decompress(&info_);
            return fail(failure, "it is of another size than the file says");
        }
        if (info_.num_components != 1 && info_.num_components != kChannels) {
            jpeg_abort_decompress(&info_);
            return fail(failure, "it is neither grey nor of three colors");
        }
        info_.out_color_space = JCS_RGB;
        info_.scale_num = 1;
        info_.scale_denom = static_cast<unsigned>(scale);
        jpeg_start_decompress(&info_);
        if (headers.baseline) {
            if (!scan_.start(info_, headers, window)) {
                jpeg_abort_decompress(&info_);
                return fail(failure, "its headers contradict each other");
            }
            info_.client_data = this;
            replace_entropy_decoding(info_, next_mcu);
        }

        // In scaled coordinates the crop may start within a pixel, which the resizer handles. The margin provides the
        // neighbors that the interpolation of colors needs.
        const double top = double(r.top - window.top) / scale, left = double(r.left - window.left) / scale;
        const double height = double(r.crop_height) / scale, width = double(r.crop_width) / scale;
        JDIMENSION first_column = static_cast<JDIMENSION>(std::max(0, static_cast<int>(std::floor(left)) - kMargin));
        const JDIMENSION last_column =
            std::min(info_.output_width, static_cast<JDIMENSION>(std::ceil(left + width)) + kMargin);
        JDIMENSION columns = last_column - first_column;
        jpeg_crop_scanline(&info_, &first_column, &columns);
        const JDIMENSION first_row = static_cast<JDIMENSION>(std::floor(top));
        const int rows = std::min<int>(info_.output_height, static_cast<int>(std::ceil(top + height))) - first_row;
        if (first_row > 0 && jpeg_skip_scanlines(&info_, first_row) != first_row) {
            jpeg_abort_decompress(&info_);
            return fail(failure, "it ends before the crop");
        }
        // The only large allocation: no more than the crop needs.
        const size_t pitch = static_cast<size_t>(columns) * kChannels;
        prepare(pitch * rows, top - first_row, height, left - first_column, width, static_cast<int>(columns), side, r.flip, out);
        for (int done = 0; done < rows;) {
            JSAMPROW lines[kLines];
            const int wanted = std::min(kLines, rows - done);
            for (int i = 0; i < wanted; ++i) lines[i] = pixels_.data() + pitch * (done + i);
            done += static_cast<int>(jpeg_read_scanlines(&info_, lines, static_cast<JDIMENSION>(wanted)));
            resizer_.resize_ready(pixels_.data(), pitch, done, done == rows);
        }
        jpeg_abort_decompress(&info_);  // rows below the crop are not decoded
        return true;
    }

    // The MCUs that the crop at this scale needs, with the margin.
    static Window window_around(const Request& r, int scale, const Headers& headers) {
        const int margin = kMargin * scale;
        const auto down = [](int place, int unit) { return std::max(0, place) / unit * unit; };
        const auto up = [](int place, int unit, int most) { return std::min(most, (place + unit - 1) / unit * unit); };
        const int top = down(r.top - margin, headers.mcu_height), left = down(r.left - margin, headers.mcu_width);
        return {top, left, up(r.top + r.crop_height + margin, headers.mcu_height, r.height) - top,
                up(r.left + r.crop_width + margin, headers.mcu_width, r.width) - left};
    }

    void copy_headers(const Headers& headers, const uint8_t* bytes, const Window& window) {
        headers_.assign(bytes, bytes + headers.size);
        uint8_t* size = headers_.data() + headers.frame;
        size[0] = static_cast<uint8_t>(window.height >> 8), size[1] = static_cast<uint8_t>(window.height);
        size[2] = static_cast<uint8_t>(window.width >> 8), size[3] = static_cast<uint8_t>(window.width);
    }

    // Stands in for libjpeg's entropy decoding.
    static boolean next_mcu(j_decompress_ptr info, JBLOCKROW* blocks) {
        auto* decoder = static_cast<Decoder*>(info->client_data);
        if (!decoder->scan_.next(blocks)) {
            decoder->handler_.reason = "its data are damaged or end early";
            leave(reinterpret_cast<j_common_ptr>(info));
        }
        return TRUE;
    }

    void prepare(size_t bytes, double y, double crop_height, double x, double crop_width, int columns, int side,
                 bool flip, uint8_t* out) {
        if (pixels_.size() < bytes) pixels_.resize(bytes);
        resizer_.begin(y, crop_height, x, crop_width, columns, side, flip, out);
    }

    // libjpeg-turbo has vectorized transforms for these reductions only; the others cost more than they save.
    static int dct_scale(const Request& r, int side) {
        const int shorter = std::min(r.crop_height, r.crop_width);
        for (int scale : {8, 4, 2}) {
            if (shorter >= side * scale) return scale;
        }
        return 1;
    }

    static constexpr int kLines = 8;
    static constexpr int kMargin = 2;
    const bool plain_;
    Handler handler_{};
    jpeg_decompress_struct info_{};
    jpeg_progress_mgr monitor_{};
    Resizer resizer_;
    Checksum checksum_;
    Scan scan_;
    std::vector<uint8_t> headers_;
    std::vector<uint8_t> pixels_;
    bool created_ = false;
};

}  // namespace

extern "C" {

// Decode `count` images into `out`, uint8 [count, side, side, 3]. Returns -1, or the index of the first image that
// cannot be decoded, with the reason in `message` (of `message_size` bytes).
int64_t brisk_decode_batch(const Request* requests, int64_t count, int32_t side, int32_t exact, int32_t plain,
                           uint8_t* out, char* message, int64_t message_size) {
    int64_t i = 0;
    Failure failure{};
    try {
        Decoder decoder(plain);
        while (i < count) {
            uint8_t* crop = out + static_cast<size_t>(i) * side * side * kChannels;
            if (!decoder.decode(requests[i], side, exact, crop, failure)) break;
            ++i;
        }
    } catch (const std::bad_alloc&) {
        std::snprintf(failure.text, sizeof failure.text, "there is not enough memory to decode it");
    }
    std::snprintf(message, static_cast<size_t>(message_size), "%s", failure.text);
    return i < count ? i : -1;
}

// The JPEG with a restart marker after each row of MCUs, in `out` of `capacity` bytes. Returns its size; 0 where it is
// better left as it is, or does not fit.
int64_t brisk_restart_rows(const uint8_t* bytes, uint64_t size, uint8_t* out, uint64_t capacity) {
    Restarter restarter;
    size_t made_size = 0;
    const uint8_t* made = restarter.restarted(bytes, size, made_size);
    if (made == nullptr || made_size > capacity) return 0;
    std::memcpy(out, made, made_size);
    return static_cast<int64_t>(made_size);
}

// Increase with every change of the functions above, so that libraries built before are not used.
int32_t brisk_decode_version() { return 3; }

}  // extern "C"
