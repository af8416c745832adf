// Mutated JPEGs through the decoder, to be built with sanitizers: mutants COUNT FOLDER
// Prints as JSON how many were decoded and how many were refused. What both our entropy
// decoding and libjpeg's take must give the same pixels. FOLDER gets NAME.jpg and NAME.rgb of some that were
// decoded as a whole, SIDE x SIDE px, so that another decoder's pixels can be compared.

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <random>
#include <string>

#include "decode.cpp"

namespace {

using Bytes = std::vector<uint8_t>;

constexpr int kSide = 80;         // no multiple of 16 x 4: the last blocks of all subsamplings are partly outside
constexpr int kMostWritten = 2000;

struct Kind {
    const char* name;
    int components, across, down;  // luma samples per chroma sample
    bool progressive, arithmetic;
    int restart_rows, quality;
};

constexpr Kind kKinds[] = {
    {"444", 3, 1, 1, false, false, 0, 90},      {"422", 3, 2, 1, false, false, 0, 90},
    {"420", 3, 2, 2, false, false, 0, 90},      {"440", 3, 1, 2, false, false, 0, 90},
    {"411", 3, 4, 1, false, false, 0, 90},      {"gray", 1, 1, 1, false, false, 0, 90},
    {"progressive", 3, 2, 2, true, false, 0, 90}, {"progressive444", 3, 1, 1, true, false, 1, 70},
    {"arithmetic", 3, 2, 2, false, true, 0, 90}, {"arithmetic-progressive", 3, 1, 1, true, true, 0, 90},
    {"restarts", 3, 2, 2, false, false, 1, 90}, {"coarse", 3, 2, 2, false, false, 0, 15},
};

Bytes encode(const Kind& kind) {
    std::mt19937 random(1);
    Bytes pixels(kSide * kSide * 3);
    for (int y = 0; y < kSide; ++y) {
        for (int x = 0; x < kSide; ++x) {
            for (int c = 0; c < 3; ++c) {
                pixels[(y * kSide + x) * 3 + c] = static_cast<uint8_t>((x * (c + 2) + y * 3 + random() % 40) & 0xff);
            }
        }
    }
    jpeg_compress_struct info{};
    jpeg_error_mgr errors{};
    info.err = jpeg_std_error(&errors);
    jpeg_create_compress(&info);
    unsigned char* memory = nullptr;
    unsigned long size = 0;
    jpeg_mem_dest(&info, &memory, &size);
    info.image_width = info.image_height = kSide;
    info.input_components = 3;
    info.in_color_space = JCS_RGB;
    jpeg_set_defaults(&info);
    if (kind.components == 1) jpeg_set_colorspace(&info, JCS_GRAYSCALE);
    info.comp_info[0].h_samp_factor = kind.across;
    info.comp_info[0].v_samp_factor = kind.down;
    info.arith_code = kind.arithmetic;
    info.restart_in_rows = kind.restart_rows;
    jpeg_set_quality(&info, kind.quality, TRUE);
    if (kind.progressive) jpeg_simple_progression(&info);
    jpeg_start_compress(&info, TRUE);
    Bytes row(kSide * 3);
    while (info.next_scanline < info.image_height) {
        JSAMPROW line = pixels.data() + info.next_scanline * kSide * 3;
        jpeg_write_scanlines(&info, &line, 1);
    }
    jpeg_finish_compress(&info);
    const Bytes encoded(memory, memory + size);
    jpeg_destroy_compress(&info);
    std::free(memory);
    return encoded;
}

class Mutator {
   public:
    size_t below(size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random_); }

    void mutate(Bytes& bytes) {
        const size_t times = 1 + below(8);
        for (size_t i = 0; i < times && !bytes.empty(); ++i) {
            // Half of them among the headers, where the sizes and tables are.
            const size_t at = below(2) ? below(bytes.size()) : below(std::min<size_t>(bytes.size(), 700));
            const auto place = bytes.begin() + static_cast<ptrdiff_t>(at);
            switch (below(8)) {
                case 0: bytes[at] = static_cast<uint8_t>(below(256)); break;
                case 1: bytes[at] ^= static_cast<uint8_t>(1u << below(8)); break;
                case 2: bytes[at] = below(2) ? 0xff : 0x00; break;
                case 3: if (below(3) == 0) bytes.resize(at); break;
                case 4: bytes.erase(place, bytes.begin() + static_cast<ptrdiff_t>(std::min(bytes.size(), at + 1 + below(16)))); break;
                case 5: insert_junk(bytes); break;
                case 6: copy_segment(bytes); break;
                default: bytes.insert(place, bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(below(std::min<size_t>(bytes.size(), 64))));
            }
        }
    }

   private:
    // An APP1 of random bytes, with a length that may be wrong, after the start of the image.
    void insert_junk(Bytes& bytes) {
        if (bytes.size() < 2) return;
        const size_t length = below(300), claimed = below(4) ? length + 2 : below(65'536);
        Bytes junk{0xff, 0xe1, static_cast<uint8_t>(claimed >> 8), static_cast<uint8_t>(claimed), 'E', 'x', 'i', 'f', 0, 0};
        for (size_t i = 6; i < length; ++i) junk.push_back(static_cast<uint8_t>(below(256)));
        bytes.insert(bytes.begin() + 2, junk.begin(), junk.end());
    }

    // What stands between two markers, a second time at another marker.
    void copy_segment(Bytes& bytes) {
        std::vector<size_t> markers;
        for (size_t i = 0; i + 1 < bytes.size(); ++i) {
            if (bytes[i] == 0xff && bytes[i + 1] > 1) markers.push_back(i);
        }
        if (markers.size() < 2) return;
        const size_t from = below(markers.size() - 1), to = below(markers.size());
        const Bytes segment(bytes.begin() + static_cast<ptrdiff_t>(markers[from]), bytes.begin() + static_cast<ptrdiff_t>(markers[from + 1]));
        bytes.insert(bytes.begin() + static_cast<ptrdiff_t>(markers[to]), segment.begin(), segment.end());
    }

    std::mt19937 random_{0};
};

// The size in the frame header; also writes another one there if asked to.
bool frame_size(Bytes& bytes, int& height, int& width, bool change) {
    for (size_t i = 2; i + 9 < bytes.size() && bytes[i] == 0xff; i += 2 + (bytes[i + 2] << 8 | bytes[i + 3])) {
        const int marker = bytes[i + 1];
        if (marker < 0xc0 || marker > 0xcf || marker == 0xc4 || marker == 0xc8 || marker == 0xcc) continue;
        if (change) {
            bytes[i + 5] = static_cast<uint8_t>(height >> 8), bytes[i + 6] = static_cast<uint8_t>(height);
            bytes[i + 7] = static_cast<uint8_t>(width >> 8), bytes[i + 8] = static_cast<uint8_t>(width);
        }
        height = bytes[i + 5] << 8 | bytes[i + 6], width = bytes[i + 7] << 8 | bytes[i + 8];
        return true;
    }
    return false;
}

void write(const std::string& name, const Bytes& bytes) {
    std::ofstream(name, std::ios::binary).write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
}

// Whether the image with restart markers, if it can get them, has these pixels where it is decoded at full size.
bool restarts_alike(const Request& request, int side, const Bytes& pixels, bool failed) {
    Bytes made(2 * request.size + 1);
    const int64_t size = brisk_restart_rows(request.bytes, request.size, made.data(), made.size());
    if (size == 0 || failed) return true;
    made.resize(static_cast<size_t>(size));
    Request again = request;
    again.bytes = made.data();
    again.size = made.size();
    Bytes out[2] = {Bytes(pixels.size()), Bytes(pixels.size())};
    const Request* requests[2] = {&request, &again};
    char message[200];
    for (int i = 0; i < 2; ++i) {
        if (brisk_decode_batch(requests[i], 1, side, 1, 0, out[i].data(), message, sizeof message) >= 0) return i == 0;
    }
    return out[0] == out[1];
}

}  // namespace

int main(int, char** arguments) {
    const int runs = std::atoi(arguments[1]);
    const std::string folder = arguments[2];
    std::vector<Bytes> seeds;
    for (const Kind& kind : kKinds) seeds.push_back(encode(kind));
    Mutator random;
    const auto below = [&](int n) { return static_cast<int>(random.below(static_cast<size_t>(n))); };
    int decoded = 0, refused = 0, differing = 0, written = 0;
    for (int run = 0; run < runs; ++run) {
        const size_t number = static_cast<size_t>(run) % seeds.size();
        const bool whole = static_cast<size_t>(run) < seeds.size();  // first each as it is
        Bytes mutated = seeds[number];
        if (!whole) random.mutate(mutated);
        int height = kSide, width = kSide;
        if (!whole && below(8) == 0) {  // a large size, that the caller believes as well
            const int sizes[] = {1, 7, 1'000, 4'000, 65'500};
            height = sizes[below(5)], width = sizes[below(5)];
            frame_size(mutated, height, width, true);
        } else if (below(2)) {
            frame_size(mutated, height, width, false);
        }
        // A copy of exactly its size, so that a read beyond it is seen.
        const Bytes bytes(mutated.begin(), mutated.end());
        Request request{};
        request.bytes = bytes.data();
        request.size = bytes.size();
        request.is_jpeg = 1;
        request.height = height, request.width = width;
        const bool compared = whole || (height == kSide && width == kSide && below(3) == 0);
        request.crop_height = compared ? height : 1 + below(std::max(1, height));
        request.crop_width = compared ? width : 1 + below(std::max(1, width));
        request.top = below(std::max(1, height - request.crop_height + 1));
        request.left = below(std::max(1, width - request.crop_width + 1));
        request.flip = !compared && below(2);
        const int side = compared ? kSide : 1 + below(60);
        Bytes out(static_cast<size_t>(side) * side * 3);
        char message[200];
        const int exact = compared || below(2);
        const bool failed = brisk_decode_batch(&request, 1, side, exact, 0, out.data(), message, sizeof message) >= 0;
        Bytes libjpegs(out.size());
        char reason[200];
        const bool libjpeg_failed = brisk_decode_batch(&request, 1, side, exact, 1, libjpegs.data(), reason, sizeof reason) >= 0;
        if (failed != libjpeg_failed) ++differing;
        if (!failed && !libjpeg_failed && out != libjpegs) {
            std::fprintf(stderr, "%s: mutant %d has other pixels than with libjpeg's entropy decoding\n", kKinds[number].name, run);
            return 1;
        }
        if (!restarts_alike(request, side, out, failed)) {
            std::fprintf(stderr, "%s: mutant %d has other pixels with restart markers\n", kKinds[number].name, run);
            return 1;
        }
        failed ? ++refused : ++decoded;
        if (whole && failed) std::fprintf(stderr, "%s: %s\n", kKinds[number].name, message);
        if (whole && failed) return 1;
        if (compared && !failed && written < kMostWritten) {
            const std::string name = folder + "/" + std::to_string(written++) + "-" + kKinds[number].name;
            write(name + ".jpg", bytes);
            write(name + ".rgb", out);
        }
    }
    std::printf("{\"decoded\": %d, \"refused with a reason\": %d, \"taken by one way only\": %d}\n", decoded, refused, differing);
    return 0;
}
