// Mutated JPEGs through the decoder, to be built with sanitizers: fuzz_decode COUNT SEED.jpg ...
// Prints how many were decoded and how many were refused.

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>

#include "decode.cpp"

namespace {

using Bytes = std::vector<uint8_t>;

void mutate(Bytes& bytes, std::mt19937& random) {
    const auto below = [&](size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random); };
    const size_t times = 1 + below(8);
    for (size_t i = 0; i < times && !bytes.empty(); ++i) {
        // Half of them among the headers, where the sizes and tables are.
        const size_t at = below(2) ? below(bytes.size()) : below(std::min<size_t>(bytes.size(), 700));
        switch (below(6)) {
            case 0: bytes[at] = static_cast<uint8_t>(below(256)); break;
            case 1: bytes[at] ^= static_cast<uint8_t>(1u << below(8)); break;
            case 2: bytes[at] = below(2) ? 0xff : 0x00; break;
            case 3: bytes.resize(at); break;
            case 4: bytes.erase(bytes.begin() + at, bytes.begin() + std::min(bytes.size(), at + 1 + below(16))); break;
            default: bytes.insert(bytes.begin() + at, bytes.begin(), bytes.begin() + below(std::min<size_t>(bytes.size(), 64)));
        }
    }
}

}  // namespace

int main(int count, char** arguments) {
    const int runs = std::atoi(arguments[1]);
    std::vector<Bytes> seeds;
    for (int i = 2; i < count; ++i) {
        std::ifstream file(arguments[i], std::ios::binary);
        seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    }
    std::mt19937 random(0);
    const auto below = [&](int n) { return std::uniform_int_distribution<int>(0, n - 1)(random); };
    int decoded = 0, refused = 0;
    for (int run = 0; run < runs; ++run) {
        // A copy of exactly its size, so that a read beyond it is seen.
        Bytes mutated = seeds[run % seeds.size()];
        mutate(mutated, random);
        const Bytes bytes(mutated.begin(), mutated.end());
        Request request{};
        request.bytes = bytes.data();
        request.size = bytes.size();
        request.is_jpeg = 1;
        request.height = 128;
        request.width = 100;
        request.crop_height = 1 + below(128);
        request.crop_width = 1 + below(100);
        request.top = below(128 - request.crop_height + 1);
        request.left = below(100 - request.crop_width + 1);
        request.flip = below(2);
        const int side = 1 + below(60);
        std::vector<uint8_t> out(static_cast<size_t>(side) * side * 3);
        char message[200];
        const bool failed =
            brisk_decode_batch(&request, 1, side, below(2), below(2), out.data(), message, sizeof message) >= 0;
        failed ? ++refused : ++decoded;
    }
    std::printf("%d %d\n", decoded, refused);
    return 0;
}
