//! Large blocks of memory, from the kernel and back to it. One of the places with `unsafe`: an
//! allocator cannot be written without.
//!
//! A C library, which is not told a block's length when it is given back, writes it beside the block
//! (musl at both ends). So a large block that is asked for as zeros and never touched costs a page or
//! two all the same, and sled has 41 such blocks: 328 KiB with musl.

#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::c_void;
use std::ptr;

use rustix::mm::{MapFlags, MremapFlags, ProtFlags, mmap_anonymous, mremap, munmap};

/// As in musl, where smaller blocks share pages with others.
const LARGE_BYTES: usize = 128 * 1024;
/// What the kernel gives begins on a border of this at least, on every machine.
const PAGE_BYTES: usize = 4096;

/// The system's allocator, but for large blocks.
pub struct Heap;

fn is_large(bytes: usize, align: usize) -> bool {
    bytes >= LARGE_BYTES && align <= PAGE_BYTES
}

// Not inlined, so that the choice does not stand in every caller.
// SAFETY: whether a block is large follows from its layout alone, so it is freed and resized by whom
// it came from. Blocks of the kernel are fresh, zeroed, and no part of any other.
unsafe impl GlobalAlloc for Heap {
    #[inline(never)]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !is_large(layout.size(), layout.align()) {
            // SAFETY: the caller's promises are those that `System` asks for.
            return unsafe { System.alloc(layout) };
        }
        // SAFETY: a new mapping at a place of the kernel's choice touches nothing that exists.
        let block = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                layout.size(),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        };
        block.map_or(ptr::null_mut(), <*mut c_void>::cast)
    }

    #[inline(never)]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_large(layout.size(), layout.align()) {
            // SAFETY: the caller's promises; what the kernel gives is zeroed.
            return unsafe { self.alloc(layout) };
        }
        // SAFETY: the caller's promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    #[inline(never)]
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if is_large(layout.size(), layout.align()) {
            // SAFETY: `alloc` has mapped this block with this length, and nobody uses it any more.
            // It can only fail where the kernel has no room to split a mapping: then it stays.
            let _ = unsafe { munmap(block.cast(), layout.size()) };
        } else {
            // SAFETY: `System` has given this block.
            unsafe { System.dealloc(block, layout) }
        }
    }

    #[inline(never)]
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_bytes: usize) -> *mut u8 {
        let (was_large, align) = (is_large(layout.size(), layout.align()), layout.align());
        match (was_large, is_large(new_bytes, align)) {
            // SAFETY: `System` has given this block.
            (false, false) => unsafe { System.realloc(block, layout, new_bytes) },
            (true, true) => {
                // SAFETY: `alloc` has mapped this block with this length; it may move.
                let moved =
                    unsafe { mremap(block.cast(), layout.size(), new_bytes, MremapFlags::MAYMOVE) };
                moved.map_or(ptr::null_mut(), <*mut c_void>::cast)
            }
            _ => {
                // SAFETY: the caller promises that this length with this alignment is a layout; both
                // blocks are at least as long as what is copied.
                unsafe {
                    let new = self.alloc(Layout::from_size_align_unchecked(new_bytes, align));
                    if !new.is_null() {
                        ptr::copy_nonoverlapping(block, new, layout.size().min(new_bytes));
                        self.dealloc(block, layout);
                    }
                    new
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fills, resizes and frees a block by way of this allocator.
    fn through(lengths: &[usize], align: usize) {
        let layout = |bytes| Layout::from_size_align(bytes, align).expect("a layout");
        let mut bytes = lengths[0];
        // SAFETY: each block is used within its length and freed once, with its layout.
        unsafe {
            let mut block = Heap.alloc_zeroed(layout(bytes));
            assert!(!block.is_null());
            assert_eq!(block as usize % align, 0);
            let content = std::slice::from_raw_parts_mut(block, bytes);
            assert!(content.iter().all(|byte| *byte == 0), "zeroed");
            for (at, byte) in content.iter_mut().enumerate() {
                *byte = at as u8;
            }
            let mut filled = bytes;
            for next in &lengths[1..] {
                block = Heap.realloc(block, layout(bytes), *next);
                assert!(!block.is_null());
                bytes = *next;
                filled = filled.min(bytes);
                let content = std::slice::from_raw_parts(block, filled);
                let is_kept = |(at, byte): (usize, &u8)| *byte == at as u8;
                assert!(content.iter().enumerate().all(is_kept), "kept");
            }
            Heap.dealloc(block, layout(bytes));
        }
    }

    #[test]
    fn blocks_keep_what_they_hold_over_every_change_of_length() {
        let (small, large) = (LARGE_BYTES - 1, LARGE_BYTES);
        through(&[small, large, small], 1);
        through(&[large, 3 * large + 1, large + 7, 10, small], 16);
        through(&[large + 5000, large], PAGE_BYTES);
        through(&[large, 2 * large, 1], 2 * PAGE_BYTES);
    }

    #[test]
    fn a_large_block_that_is_not_touched_costs_no_page() {
        let resident = || {
            let pages = std::fs::read_to_string("/proc/self/statm").expect("statm");
            let pages = pages
                .split(' ')
                .nth(1)
                .expect("the second is what is resident");
            pages.parse::<usize>().expect("a number")
        };
        let layout = Layout::from_size_align(LARGE_BYTES, 8).expect("a layout");
        let before = resident();
        // SAFETY: each block is freed once, with its layout.
        unsafe {
            let blocks: Vec<*mut u8> = (0..4096).map(|_| Heap.alloc_zeroed(layout)).collect();
            let more = resident().saturating_sub(before);
            for block in blocks {
                Heap.dealloc(block, layout);
            }
            // Other tests run beside this one.
            assert!(more < 2048, "{more} pages for 4096 blocks");
        }
    }
}
