// A JPEG with a restart marker after each row of block groups (MCUs), from which decoding may begin: the same coefficients,
// so the same pixels.

#ifndef BRISK_RESTARTS_H
#define BRISK_RESTARTS_H

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include <jpeglib.h>

#include "baseline.h"
#include "errors.h"

namespace {

class Restarter {
   public:
    Restarter() {
        prepare_handler(handler_);
        reader_.err = writer_.err = &handler_.base;
        created_ = setjmp(handler_.leave) == 0;
        if (!created_) return;
        jpeg_create_decompress(&reader_);
        jpeg_create_compress(&writer_);
    }
    Restarter(const Restarter&) = delete;
    Restarter& operator=(const Restarter&) = delete;
    ~Restarter() {
        jpeg_destroy_decompress(&reader_);  // does nothing if it was not created
        jpeg_destroy_compress(&writer_);
        std::free(made_);
    }

    // The JPEG with restart markers; null for one that is damaged, that has some, or that is none for baseline.h. Metadata
    // that no decoder of pixels reads is left out.
    const uint8_t* restarted(const uint8_t* bytes, size_t size, size_t& made_size) {
        const Headers headers = read_headers(bytes, size);
        if (!created_ || !headers.baseline || headers.interval != 0) return nullptr;
        if (setjmp(handler_.leave)) return nullptr;
        jpeg_mem_src(&reader_, const_cast<uint8_t*>(bytes), static_cast<unsigned long>(size));
        jpeg_read_header(&reader_, TRUE);
        jvirt_barray_ptr* coefficients = jpeg_read_coefficients(&reader_);
        jpeg_mem_dest(&writer_, &made_, &made_size_);
        jpeg_copy_critical_parameters(&reader_, &writer_);
        writer_.optimize_coding = TRUE;
        writer_.restart_in_rows = 1;
        jpeg_write_coefficients(&writer_, coefficients);
        jpeg_finish_compress(&writer_);
        jpeg_finish_decompress(&reader_);
        made_size = made_size_;
        return made_;
    }

   private:
    Handler handler_{};
    jpeg_decompress_struct reader_{};
    jpeg_compress_struct writer_{};
    unsigned char* made_ = nullptr;
    unsigned long made_size_ = 0;
    bool created_ = false;
};

}  // namespace

#endif
