// Entropy decoding of baseline JPEGs in place of libjpeg's: of a window of the image, faster, with the same coefficients.
//
// libjpeg decodes every coefficient of the file. Here a copy of the headers declares the size of the window, so that
// libjpeg transforms and colors only that, and asks a `Scan` for each block group (MCU) in turn. The scan walks over
// those outside of the window, whose bits it must read and whose coefficients it need not keep.
//
// The bytes are not trusted: what the headers say is compared with what libjpeg reads there, each code is one of the
// table's, and no bit beyond the data is used.

#ifndef BRISK_BASELINE_H
#define BRISK_BASELINE_H

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include <jpeglib.h>

namespace {

// For functions that are compiled twice, without and with BMI2: on Intel's processors its shifts by a variable number of
// bits are one operation each, and others three. They are inlined, since they take on the instructions of the caller.
#define BRISK_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define BRISK_BMI2 __attribute__((target("bmi,bmi2")))
inline bool has_bmi2() { return __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2"); }
#else
#define BRISK_BMI2
inline bool has_bmi2() { return false; }
#endif

constexpr int kBlockSide = 8;
constexpr int kMostBlocks = 10;  // in an MCU, by the standard

// --- headers ---------------------------------------------------------------------------------------------------------

// The headers of a JPEG whose one scan has all components, Huffman-coded: what nearly every JPEG is.
struct Headers {
    bool baseline = false;   // the rest is set only then
    size_t size = 0;         // bytes, up to the scan's data
    size_t frame = 0;        // place of the height in the frame header, which the width follows
    int height = 0, width = 0;
    int mcu_height = 0, mcu_width = 0;  // px
    int components = 0;
    int interval = 0;                   // MCUs between two restart markers, or 0 for none

    int columns() const { return (width + mcu_width - 1) / mcu_width; }  // of MCUs
    int rows() const { return (height + mcu_height - 1) / mcu_height; }
};

inline int big_endian(const uint8_t* bytes) { return bytes[0] << 8 | bytes[1]; }

// Reads the frame header's contents; false if an MCU is not as in a color image with all components in one scan.
inline bool read_frame(const uint8_t* frame, size_t size, Headers& headers) {
    if (size < 6 || frame[0] != 8) return false;
    headers.height = big_endian(frame + 1);
    headers.width = big_endian(frame + 3);
    headers.components = frame[5];
    if (headers.components != 1 && headers.components != 3) return false;
    if (size != 6 + size_t{3} * headers.components || headers.height == 0 || headers.width == 0) return false;
    int across = 0, down = 0, blocks = 0;
    for (int c = 0; c < headers.components; ++c) {
        const int h = frame[7 + 3 * c] >> 4, v = frame[7 + 3 * c] & 15;
        if (h < 1 || v < 1 || h > 4 || v > 4) return false;
        across = std::max(across, h);
        down = std::max(down, v);
        blocks += h * v;
    }
    if (blocks > kMostBlocks || (headers.components == 1 && blocks > 1)) return false;
    headers.mcu_width = kBlockSide * across;
    headers.mcu_height = kBlockSide * down;
    return true;
}

inline Headers read_headers(const uint8_t* bytes, size_t size) {
    Headers headers;
    bool has_frame = false;
    if (size < 2 || bytes[0] != 0xff || bytes[1] != 0xd8) return {};
    for (size_t at = 2; at + 4 <= size && bytes[at] == 0xff;) {
        const int marker = bytes[at + 1];
        const size_t length = static_cast<size_t>(big_endian(bytes + at + 2)), contents = at + 4;
        if (length < 2 || length > size - at - 2) return {};
        if (marker == 0xc0 || marker == 0xc1) {  // baseline or extended, Huffman
            if (has_frame || !read_frame(bytes + contents, length - 2, headers)) return {};
            headers.frame = contents + 1;
            has_frame = true;
        } else if (marker == 0xda) {
            headers.size = at + 2 + length;
            headers.baseline = has_frame && length >= 3 && bytes[contents] == headers.components;
            return headers;
        } else if (marker == 0xdd) {
            if (length != 4) return {};
            headers.interval = big_endian(bytes + contents);
        } else if (marker != 0xc4 && marker != 0xdb && marker != 0xfe && (marker & 0xf0) != 0xe0) {
            return {};  // another kind of frame, or what stands alone
        }
        at += 2 + length;
    }
    return {};
}

// --- Huffman codes ---------------------------------------------------------------------------------------------------

constexpr int kLookBits = 10;
constexpr uint8_t kBeyond = 64;  // zeros that the end of a block stands for

// What the next bits are: `code` bits of a code and `size` bits of a value, `run` zeros before it. A code that is longer
// than kLookBits or none has total = 0.
struct Symbol {
    uint8_t total, code, size, run;
};

// All symbols whose codes lie within the next kLookBits: the bits that they and their values take, how many coefficients
// they stand for, and whether the last one ends the block. total = 0 if there is no whole code.
struct Symbols {
    uint8_t total, coefficients;
    bool ends_block;
};

class HuffmanTable {
   public:
    // Does nothing if it is the table that is there. libjpeg has checked that it is one.
    void set(const JHUFF_TBL& table) {
        if (set_ && std::memcmp(bits_, table.bits, sizeof bits_) == 0 && std::memcmp(values_, table.huffval, sizeof values_) == 0) {
            return;
        }
        std::memcpy(bits_, table.bits, sizeof bits_);
        std::memcpy(values_, table.huffval, sizeof values_);
        set_ = true;
        look_.fill({});
        uint32_t code = 0;
        int index = 0;
        for (int length = 1; length <= 16; ++length) {
            first_index_[length] = index - static_cast<int>(code);
            for (int i = 0; i < bits_[length] && index < 256; ++i, ++code, ++index) {
                if (length > kLookBits) continue;
                const Symbol symbol = make(length, values_[index]);
                const size_t from = size_t{code} << (kLookBits - length), count = size_t{1} << (kLookBits - length);
                for (size_t at = from; at < from + count && at < look_.size(); ++at) look_[at] = symbol;
            }
            end_[length] = code;  // of the codes of this length
            code <<= 1;
        }
        for (size_t bits = 0; bits < look_.size(); ++bits) several_[bits] = join(bits);
    }

    BRISK_INLINE Symbol look(uint64_t bits) const { return look_[bits >> (64 - kLookBits)]; }

    BRISK_INLINE Symbols look_at_several(uint64_t bits) const { return several_[bits >> (64 - kLookBits)]; }

    // For a code that `look` does not have; total = 0 if there is none.
    Symbol search(uint64_t bits) const {
        for (int length = kLookBits + 1; length <= 16; ++length) {
            const uint32_t code = static_cast<uint32_t>(bits >> (64 - length));
            if (code < end_[length]) return make(length, values_[(first_index_[length] + static_cast<int>(code)) & 255]);
        }
        return {};
    }

   private:
    static Symbol make(int length, uint8_t value) {
        const uint8_t size = value & 15, run = value >> 4;
        const bool ends_block = size == 0 && run != 15;
        return {static_cast<uint8_t>(length + size), static_cast<uint8_t>(length), size, ends_block ? kBeyond : run};
    }

    // What the kLookBits `bits` begin with. The bits of the last one's value need not be among them.
    Symbols join(size_t bits) const {
        Symbols joined{};
        while (joined.total < kLookBits && !joined.ends_block) {
            const Symbol next = look_[bits << joined.total & (look_.size() - 1)];
            if (next.total == 0 || joined.total + next.code > kLookBits) break;
            joined.total = static_cast<uint8_t>(joined.total + next.total);
            joined.ends_block = next.run == kBeyond;
            if (!joined.ends_block) joined.coefficients = static_cast<uint8_t>(joined.coefficients + next.run + 1);
        }
        return joined;
    }

    std::array<Symbol, 1 << kLookBits> look_{};
    std::array<Symbols, 1 << kLookBits> several_{};
    uint32_t end_[17] = {};
    int first_index_[17] = {};
    uint8_t bits_[17] = {};
    uint8_t values_[256] = {};
    bool set_ = false;
};

// Places of the coefficients in their order in the file; what a damaged run would put beyond the block goes to its end, as
// in libjpeg.
constexpr uint8_t kPlaces[64 + kBeyond] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13,
    6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31,
    39, 46, 53, 60, 61, 54, 47, 55, 62, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63};

// --- bits ------------------------------------------------------------------------------------------------------------

constexpr size_t kSlack = 4096;  // zeros after the data: more than one MCU can take (10 blocks of 64 x 31 bits)

// Reads from data without stuffed zeros, followed by kSlack bytes.
class BitReader {
   public:
    void start(const uint8_t* at) {
        at_ = at;
        bits_ = 0;
        count_ = 0;
    }

    // At least 56 bits are there afterwards.
    BRISK_INLINE void refill() {
        uint64_t next;
        std::memcpy(&next, at_, sizeof next);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        next = __builtin_bswap64(next);
#endif
        bits_ |= next >> count_;
        at_ += (63 - count_) >> 3;
        count_ |= 56;
    }

    BRISK_INLINE uint64_t bits() const { return bits_; }
    BRISK_INLINE void drop(int number) {
        bits_ <<= number;
        count_ -= number;
    }
    // Bits used so far, counted from `from`.
    int64_t used(const uint8_t* from) const { return (at_ - from) * 8 - count_; }

   private:
    const uint8_t* at_ = nullptr;
    uint64_t bits_ = 0;  // the next ones, from the top
    int count_ = 0;      // of them; those below may hold what the next refill adds
};

// The value of `size` bits that begin after `code` bits: F.2.2.1 of the standard, EXTEND.
BRISK_INLINE int extended(uint64_t bits, Symbol symbol) {
    const uint64_t value_bits = bits << symbol.code;
    const int value = static_cast<int>(value_bits >> 1 >> (63 - symbol.size));
    const int negative = static_cast<int>(~value_bits >> 63);
    return value - ((negative << symbol.size) - negative);
}

// --- the scan --------------------------------------------------------------------------------------------------------

// A part of the image in whole MCUs, or to the image's edge.
struct Window {
    int top = 0, left = 0, height = 0, width = 0;  // px
};

class Scan {
   public:
    // Copies the scan's data without what is stuffed into it. Throws std::bad_alloc.
    void open(const Headers& headers, const uint8_t* bytes, size_t size) {
        const uint8_t* from = bytes + headers.size;
        const uint8_t* const end = bytes + size;
        if (data_.size() < static_cast<size_t>(end - from) + kSlack) data_.resize(static_cast<size_t>(end - from) + kSlack);
        uint8_t* to = data_.data();
        const int64_t mcus = int64_t{headers.rows()} * headers.columns();
        const size_t most = headers.interval == 0 ? 1 : static_cast<size_t>((mcus - 1) / headers.interval + 1);
        segments_.clear();
        segments_.push_back({0, 0});
        bool closed = false;
        while (from < end && !closed) {
            const auto* marker = static_cast<const uint8_t*>(std::memchr(from, 0xff, static_cast<size_t>(end - from)));
            const size_t plain = static_cast<size_t>((marker ? marker : end) - from);
            std::memcpy(to, from, plain);
            to += plain;
            from += plain;
            while (from < end && *from == 0xff) ++from;
            if (from == end) break;
            const uint8_t code = *from++;
            if (code == 0) {
                *to++ = 0xff;
            } else {
                segments_.back().end = to - data_.data();
                closed = segments_.size() == most || code != 0xd0 + (segments_.size() - 1) % 8;
                if (!closed) segments_.push_back({to - data_.data(), 0});
            }
        }
        // libjpeg reads ahead, and notices the missing end before the last bits are used.
        if (!closed) segments_.back().end = std::max<int64_t>(segments_.back().begin, to - data_.data() - 8);
        std::memset(to, 0, kSlack);
    }

    // After libjpeg has read the headers with the window's size. False if they are not what was expected.
    bool start(const jpeg_decompress_struct& info, const Headers& headers, const Window& window) {
        if (info.progressive_mode || info.arith_code || info.comps_in_scan != headers.components ||
            info.num_components != headers.components || info.blocks_in_MCU > kMostBlocks ||
            static_cast<int>(info.restart_interval) != headers.interval) {
            return false;
        }
        columns_ = headers.columns();
        first_column_ = window.left / headers.mcu_width;
        end_column_ = first_column_ + (window.width + headers.mcu_width - 1) / headers.mcu_width;
        first_row_ = window.top / headers.mcu_height;
        if (static_cast<int>(info.MCUs_per_row) != end_column_ - first_column_) return false;
        blocks_ = info.blocks_in_MCU;
        for (int b = 0; b < blocks_; ++b) component_[b] = info.MCU_membership[b];
        for (int c = 0; c < info.comps_in_scan; ++c) {
            const jpeg_component_info* component = info.cur_comp_info[c];
            const JHUFF_TBL *dc = info.dc_huff_tbl_ptrs[component->dc_tbl_no], *ac = info.ac_huff_tbl_ptrs[component->ac_tbl_no];
            if (dc == nullptr || ac == nullptr) return false;
            dc_of_[c] = component->dc_tbl_no;
            ac_of_[c] = component->ac_tbl_no;
            dc_[dc_of_[c]].set(*dc);
            ac_[ac_of_[c]].set(*ac);
        }
        interval_ = headers.interval;
        next_mcu_ = int64_t{first_row_} * columns_ + first_column_;
        left_in_row_ = end_column_ - first_column_;
        at_mcu_ = 0;
        segment_ = 0;
        begin_segment();
        return true;
    }

    // The window's next MCU, from left to right and from top to bottom; a null pointer discards it. False if there is
    // no such MCU in the data.
    bool next(JBLOCKROW* blocks) {
        if (at_mcu_ < next_mcu_ && !walk_to(next_mcu_)) return false;
        if (!(blocks == nullptr ? decode<false>(nullptr) : decode<true>(blocks))) return false;
        ++next_mcu_;
        if (--left_in_row_ == 0) {
            left_in_row_ = end_column_ - first_column_;
            next_mcu_ += columns_ - left_in_row_;
        }
        return true;
    }

   private:
    struct Segment {
        int64_t begin, end;  // in data_
    };

    // Restart markers allow to begin behind them.
    bool walk_to(int64_t mcu) {
        if (interval_ > 0 && static_cast<size_t>(mcu / interval_) > segment_) {
            segment_ = static_cast<size_t>(mcu / interval_);
            if (segment_ >= segments_.size()) return false;
            begin_segment();
            at_mcu_ = mcu - mcu % interval_;
        }
        while (at_mcu_ < mcu) {
            if (!decode<false>(nullptr)) return false;
        }
        return true;
    }

    void begin_segment() {
        const Segment& segment = segments_[segment_];
        reader_.start(data_.data() + segment.begin);
        end_bits_ = segment.end * 8;
        std::fill(predictions_, predictions_ + MAX_COMPS_IN_SCAN, 0);
        left_in_segment_ = interval_ == 0 ? INT64_MAX : interval_;
    }

    template <bool kKeep>
    bool decode(JBLOCKROW* blocks) {
        return has_bmi2_ ? decode_with_bmi2<kKeep>(blocks) : decode_here<kKeep>(blocks);
    }

    template <bool kKeep>
    BRISK_BMI2 bool decode_with_bmi2(JBLOCKROW* blocks) {
        return decode_here<kKeep>(blocks);
    }

    template <bool kKeep>
    BRISK_INLINE bool decode_here(JBLOCKROW* blocks) {
        if (left_in_segment_ == 0) {
            if (++segment_ == segments_.size()) return false;
            begin_segment();
        }
        --left_in_segment_;
        BitReader reader = reader_;
        for (int b = 0; b < blocks_; ++b) {
            const int c = component_[b];
            if (!decode_block<kKeep>(reader, dc_[dc_of_[c]], ac_[ac_of_[c]], predictions_[c], kKeep ? *blocks[b] : nullptr)) {
                return false;
            }
        }
        reader_ = reader;
        ++at_mcu_;
        return reader.used(data_.data()) <= end_bits_;
    }

    template <bool kKeep>
    static BRISK_INLINE bool decode_block(BitReader& reader, const HuffmanTable& dc, const HuffmanTable& ac,
                                          uint32_t& prediction, JCOEF* block) {
        reader.refill();
        Symbol symbol = dc.look(reader.bits());
        if (__builtin_expect(symbol.total == 0, 0)) {
            symbol = dc.search(reader.bits());
            if (symbol.total == 0) return false;
        }
        prediction += static_cast<uint32_t>(extended(reader.bits(), symbol));
        reader.drop(symbol.total);
        if (!kKeep) return skip_coefficients(reader, ac);
        block[0] = static_cast<JCOEF>(prediction);
        for (int k = 1; k < 64; ++k) {
            reader.refill();
            // A symbol of the table takes at most 25 bits, so that another one, of up to 31, needs no refill.
            symbol = ac.look(reader.bits());
            if (__builtin_expect(symbol.total != 0, 1)) {
                k += symbol.run;
                block[kPlaces[k]] = static_cast<JCOEF>(extended(reader.bits(), symbol));
                reader.drop(symbol.total);
                if (++k >= 64) break;
                symbol = ac.look(reader.bits());
            }
            if (__builtin_expect(symbol.total == 0, 0)) {
                symbol = ac.search(reader.bits());
                if (symbol.total == 0) return false;
            }
            k += symbol.run;
            block[kPlaces[k]] = static_cast<JCOEF>(extended(reader.bits(), symbol));
            reader.drop(symbol.total);
        }
        return true;
    }

    static BRISK_INLINE bool skip_coefficients(BitReader& reader, const HuffmanTable& ac) {
        for (int k = 1; k < 64;) {
            reader.refill();
            // Twice at most 25 bits. One symbol alone follows where no code is whole or the block may be full.
            Symbols several = ac.look_at_several(reader.bits());
            if (skip_several(reader, several, k)) {
                if (several.ends_block) return true;
                several = ac.look_at_several(reader.bits());
                if (skip_several(reader, several, k)) {
                    if (several.ends_block) return true;
                    continue;
                }
                reader.refill();
            }
            Symbol symbol = ac.look(reader.bits());
            if (__builtin_expect(symbol.total == 0, 0)) {
                symbol = ac.search(reader.bits());
                if (symbol.total == 0) return false;
            }
            k += symbol.run + 1;
            reader.drop(symbol.total);
        }
        return true;
    }

    // False, and nothing, if the block's last coefficient, after which no code ends it, may be among them.
    static BRISK_INLINE bool skip_several(BitReader& reader, Symbols several, int& k) {
        if (several.total == 0 || k + several.coefficients >= 64) return false;
        k += several.coefficients;
        reader.drop(several.total);
        return true;
    }

    const bool has_bmi2_ = has_bmi2();
    std::vector<uint8_t> data_;
    std::vector<Segment> segments_;
    HuffmanTable dc_[NUM_HUFF_TBLS], ac_[NUM_HUFF_TBLS];
    BitReader reader_;
    size_t segment_ = 0;
    int64_t end_bits_ = 0, left_in_segment_ = 0, interval_ = 0;
    int64_t at_mcu_ = 0, next_mcu_ = 0;
    uint32_t predictions_[MAX_COMPS_IN_SCAN] = {};
    int component_[kMostBlocks] = {}, dc_of_[MAX_COMPS_IN_SCAN] = {}, ac_of_[MAX_COMPS_IN_SCAN] = {};
    int blocks_ = 0, left_in_row_ = 0, columns_ = 0, first_column_ = 0, end_column_ = 0, first_row_ = 0;
};

// Has libjpeg-turbo ask `decode_mcu` for the coefficients of each MCU, zeroed before, or a null pointer for those that it
// does not need. The structure is the beginning of the one in its jpegint.h, which is not installed; it has been the same
// from libjpeg 6b to libjpeg-turbo 3.1.
inline void replace_entropy_decoding(jpeg_decompress_struct& info, boolean (*decode_mcu)(j_decompress_ptr, JBLOCKROW*)) {
    struct EntropyDecoder {
        void (*start_pass)(j_decompress_ptr);
        boolean (*decode_mcu)(j_decompress_ptr, JBLOCKROW*);
    };
    reinterpret_cast<EntropyDecoder*>(info.entropy)->decode_mcu = decode_mcu;
}

}  // namespace

#endif
