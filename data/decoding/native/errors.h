// How libjpeg's errors reach the caller.

#ifndef BRISK_ERRORS_H
#define BRISK_ERRORS_H

#include <csetjmp>
#include <cstdio>

#include <jpeglib.h>
#include <jerror.h>

namespace {

constexpr int kMostScans = 100;  // a progressive file may claim thousands, each a pass over the whole image

// libjpeg's callbacks: errors leave by longjmp, as its interface requires.
struct Handler {
    jpeg_error_mgr base;
    jmp_buf leave;
    const char* reason;  // instead of libjpeg's, unless null
};

[[noreturn]] inline void leave(j_common_ptr info) { std::longjmp(reinterpret_cast<Handler*>(info->err)->leave, 1); }

// Warnings about lost image data are errors: libjpeg would continue with gray. The others (stray bytes, odd markers)
// are common and harmless.
inline void on_message(j_common_ptr info, int level) {
    if (level >= 0) return;
    const int code = info->err->msg_code;
    if (code == JWRN_EXTRANEOUS_DATA || code == JWRN_ADOBE_XFORM || code == JWRN_JFIF_MAJOR) return;
    leave(info);
}

inline void on_progress(j_common_ptr info) {
    auto* decoder = reinterpret_cast<j_decompress_ptr>(info);
    if (info->is_decompressor && decoder->input_scan_number > kMostScans) {
        reinterpret_cast<Handler*>(info->err)->reason = "it has more scans than any encoder makes";
        leave(info);
    }
}

inline void prepare_handler(Handler& handler) {
    jpeg_std_error(&handler.base);
    handler.base.error_exit = leave;
    handler.base.emit_message = on_message;
    handler.base.output_message = [](j_common_ptr) {};
}

}  // namespace

#endif
