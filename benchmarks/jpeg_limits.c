/* What no loader that reads JPEGs can save: libjpeg-turbo's entropy decoding alone, and the decoding of a crop at the
   reduction that is still as large as the result, without resizing it. Called by benchmarks/loader_contenders.py. */

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <jpeglib.h>

struct handler {
    struct jpeg_error_mgr base;
    jmp_buf leave;
};

static void leave(j_common_ptr info) { longjmp(((struct handler *)info->err)->leave, 1); }

static void say_nothing(j_common_ptr info) { (void)info; }

/* The crop at 1/8, 1/4, 1/2 or 1 of its size, row by row into `line`. */
static void decode_crop(j_decompress_ptr info, const int32_t *crop, int32_t side, unsigned char *line) {
    const int32_t top = crop[0], left = crop[1], height = crop[2], width = crop[3];
    const int32_t shorter = height < width ? height : width;
    int scale = 8;
    while (scale > 1 && shorter < side * scale) scale /= 2;
    info->out_color_space = JCS_RGB;
    info->scale_num = 1;
    info->scale_denom = (unsigned)scale;
    jpeg_start_decompress(info);
    JDIMENSION first_column = (JDIMENSION)(left / scale), columns = (JDIMENSION)((width + scale - 1) / scale);
    if (columns > info->output_width - first_column) columns = info->output_width - first_column;
    jpeg_crop_scanline(info, &first_column, &columns);
    const JDIMENSION first_row = (JDIMENSION)(top / scale);
    JDIMENSION end = (JDIMENSION)((top + height + scale - 1) / scale);
    if (end > info->output_height) end = info->output_height;
    if (first_row > 0) jpeg_skip_scanlines(info, first_row);
    while (info->output_scanline < end) jpeg_read_scanlines(info, &line, 1);
}

/* Decodes `count` JPEGs of at most `widest` px. crops: int32 [count, 5], top, left, height, width and an unused flip.
   side: of the result in px, or 0 for entropy decoding alone. Returns -1, or the number of the image that failed. */
int64_t decode_batch(const uint64_t *addresses, const uint64_t *sizes, const int32_t *crops, int64_t count,
                     int32_t side, int32_t widest) {
    struct jpeg_decompress_struct info;
    struct handler handler;
    volatile int64_t i = 0;
    unsigned char *line = malloc((size_t)widest * 3 + 64);
    if (line == NULL) return 0;
    info.err = jpeg_std_error(&handler.base);
    handler.base.error_exit = leave;
    handler.base.output_message = say_nothing;
    jpeg_create_decompress(&info);
    if (setjmp(handler.leave) == 0) {
        for (; i < count; ++i) {
            jpeg_mem_src(&info, (unsigned char *)(uintptr_t)addresses[i], (unsigned long)sizes[i]);
            jpeg_read_header(&info, TRUE);
            if (side == 0) {
                jpeg_read_coefficients(&info);
            } else {
                decode_crop(&info, crops + i * 5, side, line);
            }
            jpeg_abort_decompress(&info);
        }
    }
    jpeg_destroy_decompress(&info);
    free(line);
    return i < count ? i : -1;
}
