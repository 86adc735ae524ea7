//! Queues, tickets, buffers and arenas of a GPU: copies between all places, order between two queues, memory that is freed
//! while it is copied, fixed addresses, parked activations.

use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use trainer::device::timers::Phase;
use trainer::device::{
    Arena, Buffer, Error, Matrix, Parking, Place, Queue, Ticket, array, download_u8, empty, matrix, upload_u32,
};
use trainer::kernels::cuda::{fill, gather_rows};

use crate::support::{device, download, random, upload};

/// Bytes that are other ones for each seed.
fn bytes(seed: u8, count: usize) -> Vec<u8> {
    (0..count).map(|i| (i.wrapping_mul(31) >> 3) as u8 ^ (i as u8).wrapping_mul(7) ^ seed).collect()
}

fn with_bytes(mut buffer: Buffer, values: &[u8]) -> Arc<Buffer> {
    buffer.write(0, values).unwrap();
    Arc::new(buffer)
}

/// What a buffer holds after all that was asked of a queue.
fn read(queue: &Queue, buffer: &Arc<Buffer>) -> Vec<u8> {
    let host = Arc::new(Buffer::host(buffer.len()));
    queue.copy(&buffer.whole(), &host.whole(), &Ticket::done()).unwrap();
    host.with_bytes(<[u8]>::to_vec).unwrap()
}

/// Fills a matrix again and again: some milliseconds of work.
fn keep_busy(device: &Device, m: Matrix<'_>) {
    for _ in 0..40 {
        fill(device, m, 0.25).unwrap();
    }
}

fn large(device: &Device) -> Tensor {
    empty(device, (16 << 10, 8 << 10), DType::F32).unwrap()
}

#[test]
#[ignore = "gpu"]
fn bytes_arrive_from_every_place_at_every_place() {
    const COUNT: usize = 3_000_017;
    let queue = Queue::of(&device()).unwrap();
    let make = |place| match place {
        Place::Host => Buffer::host(COUNT),
        Place::Pinned => Buffer::pinned(&queue, COUNT).unwrap(),
        Place::Device => Buffer::device(&queue, COUNT).unwrap(),
    };
    let places = [Place::Host, Place::Pinned, Place::Device];
    for (from_index, from) in places.into_iter().enumerate() {
        for (to_index, to) in places.into_iter().enumerate() {
            let values = bytes((3 * from_index + to_index) as u8, COUNT);
            let source = match from {
                Place::Device => {
                    let (host, source) = (with_bytes(Buffer::host(COUNT), &values), Arc::new(make(from)));
                    queue.copy(&host.whole(), &source.whole(), &Ticket::done()).unwrap();
                    source
                }
                _ => with_bytes(make(from), &values),
            };
            let target = Arc::new(make(to));
            assert_eq!((source.place(), target.place()), (from, to));
            // Odd ranges, moved by two bytes.
            let ticket =
                queue.copy(&source.part(1..COUNT - 2).unwrap(), &target.part(3..COUNT).unwrap(), &Ticket::done());
            ticket.unwrap().wait(None).unwrap();
            assert_eq!(read(&queue, &target)[3..], values[1..COUNT - 2], "{from:?} to {to:?}");
        }
    }
}

#[test]
#[ignore = "gpu"]
fn a_queue_comes_after_another_ones_ticket() {
    let device = device();
    let main = Queue::of(&device).unwrap();
    let beside = main.beside().unwrap();
    assert!(main.is_main() && !beside.is_main() && !main.is_same(&beside));
    let (busy, values) = (large(&device), empty(&device, 1 << 16, DType::F32).unwrap());
    let buffer = Arc::new(Buffer::of_tensor(values.clone()).unwrap());
    for round in 0..5 {
        keep_busy(&device, matrix(&busy).unwrap());
        fill(&device, matrix(&values).unwrap(), round as f32).unwrap();
        let made = main.ticket().unwrap();
        let pinned = Arc::new(Buffer::pinned(&main, buffer.len()).unwrap());
        let copied = beside.copy(&buffer.whole(), &pinned.whole(), &made).unwrap();
        // The next values must not overtake the copy.
        main.after(&copied).unwrap();
        fill(&device, matrix(&values).unwrap(), -1.0).unwrap();
        let got = pinned.with_bytes(<[u8]>::to_vec).unwrap();
        assert!(got.chunks_exact(4).all(|value| value == (round as f32).to_le_bytes()), "round {round}");
    }
}

#[test]
#[ignore = "gpu"]
fn a_wait_has_a_deadline() {
    let device = device();
    let queue = Queue::of(&device).unwrap();
    let busy = large(&device);
    fill(&device, matrix(&busy).unwrap(), 0.25).unwrap();
    // Another thread's call that waits for the whole device may hold this one until the product is done.
    let late = (0..50).find_map(|_| {
        let _product = busy.matmul(&busy.t().unwrap()).unwrap();
        let ticket = queue.ticket().unwrap();
        match ticket.wait(Some(Instant::now())) {
            Ok(()) => None,
            late => Some((ticket, late)),
        }
    });
    let (ticket, waited) = late.expect("a ticket that has not come in fifty tries");
    assert!(matches!(waited, Err(Error::Late)), "{waited:?}");
    ticket.wait(Some(Instant::now() + Duration::from_secs(60))).unwrap();
    assert!(ticket.is_done().unwrap());
}

#[test]
#[ignore = "gpu"]
fn memory_that_is_dropped_is_copied_before_it_is_used_again() {
    const COUNT: usize = 64 << 20;
    let device = device();
    let main = Queue::of(&device).unwrap();
    let beside = main.beside().unwrap();
    for round in 0..4u8 {
        let values = Tensor::full(u32::from(round), COUNT / 4, &device).unwrap();
        let from = Arc::new(Buffer::of_tensor(values).unwrap());
        let target = Arc::new(Buffer::pinned(&main, COUNT).unwrap());
        let made = main.ticket().unwrap();
        beside.copy(&from.whole(), &target.whole(), &made).unwrap();
        // The pool hands out the same memory, which is overwritten at once.
        drop(from);
        let again = Tensor::full(99u32, COUNT / 4, &device).unwrap();
        let got = target.with_bytes(<[u8]>::to_vec).unwrap();
        assert!(got.chunks_exact(4).all(|v| v == u32::from(round).to_le_bytes()), "round {round}");
        // Page-locked memory that a copy reads is freed after it.
        let back = Arc::new(Buffer::device(&main, COUNT).unwrap());
        beside.copy(&target.whole(), &back.whole(), &main.ticket().unwrap()).unwrap();
        drop(target);
        back.come_home().unwrap();
        let values = read(&main, &back);
        assert!(values.chunks_exact(4).all(|v| v == u32::from(round).to_le_bytes()), "round {round}");
        drop(again);
    }
}

#[test]
#[ignore = "gpu"]
fn kernels_read_page_locked_memory_and_it_is_written_after_them() {
    let device = device();
    let queue = Queue::of(&device).unwrap();
    let table = random("table", 6 * 64);
    let mut pinned = Buffer::pinned(&queue, table.len() * 4).unwrap();
    pinned.write(0, &table).unwrap();
    let picks = upload_u32(&device, &[5, 0, 3, 3]).unwrap();
    let out = empty(&device, (4, 64), DType::F32).unwrap();
    let view = pinned.matrix(0, (6, 64), DType::F32).unwrap();
    gather_rows(&device, matrix(&out).unwrap(), view, array(&picks).unwrap()).unwrap();
    assert!(pinned.with_bytes(<[u8]>::len).is_err(), "a kernel may be writing");
    pinned.write(0, &vec![0f32; table.len()]).unwrap();
    let want: Vec<f32> = [5, 0, 3, 3].iter().flat_map(|&row| table[row * 64..(row + 1) * 64].to_vec()).collect();
    assert_eq!(download(&out), want);
    assert!(pinned.matrix(4, (6, 64), DType::F32).is_err());
}

#[test]
#[ignore = "gpu"]
fn an_arena_hands_out_the_same_memory_in_the_same_order() {
    let device = device();
    let queue = Queue::of(&device).unwrap();
    let mut arena = Arena::new(&queue, 1 << 20).unwrap();
    let first: Vec<String> = {
        let views = [
            arena.take((3, 5), DType::F32).unwrap(),
            arena.take((64, 64), DType::BF16).unwrap(),
            arena.take((1, 7), DType::F16).unwrap(),
        ];
        views.iter().for_each(|&view| fill(&device, view, 2.0).unwrap());
        views.iter().map(|view| format!("{view:?}")).collect()
    };
    arena.reset();
    let again = [
        arena.take((3, 5), DType::F32).unwrap(),
        arena.take((64, 64), DType::BF16).unwrap(),
        arena.take((1, 7), DType::F16).unwrap(),
    ];
    assert_eq!(again.iter().map(|view| format!("{view:?}")).collect::<Vec<_>>(), first);
    let picks = upload_u32(&device, &[2, 1]).unwrap();
    let out = empty(&device, (2, 5), DType::F32).unwrap();
    gather_rows(&device, matrix(&out).unwrap(), again[0], array(&picks).unwrap()).unwrap();
    assert_eq!(download(&out), [2.0; 10]);
    assert!(arena.take_array(1 << 20, DType::U8).is_err());
}

#[test]
#[ignore = "gpu"]
fn parked_values_come_back_and_their_memory_is_used_again() {
    let device = device();
    let parking = Parking::new(&device).unwrap();
    let mut locked = 0;
    for step in 0..3 {
        let values: Vec<Vec<f32>> =
            (0..6).map(|layer| random(&format!("parked {step} {layer}"), 300_000 + layer)).collect();
        let mut parked = Vec::new();
        for values in &values {
            let tensor = upload(&device, values, values.len(), DType::F32);
            parked.push(parking.park(tensor).unwrap());
            parking.end_layer().unwrap();
        }
        parking.settle().unwrap();
        // Some come back and are taken, one is dropped on its way, one where it lies.
        drop(parked.remove(4));
        let dropped = parked.remove(2);
        drop(parking.bring_back(dropped).unwrap());
        let busy = empty(&device, 300_000, DType::F32).unwrap();
        fill(&device, matrix(&busy).unwrap(), -1.0).unwrap();
        for (parked, index) in parked.into_iter().zip([0, 1, 3, 5]).rev() {
            let returning = parking.bring_back(parked).unwrap();
            assert_eq!(download(&parking.take(returning).unwrap()), values[index], "step {step}, layer {index}");
        }
        assert!(step == 0 || parking.locked_bytes() == locked, "like batches lock no more memory");
        locked = parking.locked_bytes();
    }
}

#[test]
#[ignore = "gpu"]
fn spans_are_of_the_queue_that_was_started() {
    let device = device();
    let queue = Queue::of(&device).unwrap();
    let busy = large(&device);
    queue.start_timing();
    {
        let _span = queue.span(Phase::Pointwise).unwrap();
        keep_busy(&device, matrix(&busy).unwrap());
    }
    let seconds = queue.stop_timing().unwrap();
    assert_eq!(seconds.keys().copied().collect::<Vec<_>>(), [Phase::Pointwise]);
    assert!(seconds[&Phase::Pointwise] > 1e-4, "{seconds:?}");
}

#[test]
#[ignore = "gpu"]
fn views_are_of_memory_that_kernels_reach() {
    let device = device();
    let queue = Queue::of(&device).unwrap();
    let other = Buffer::device(&queue.beside().unwrap(), 64).unwrap();
    assert!(other.matrix(0, (4, 4), DType::F32).is_err(), "its memory is freed in another order");
    let own = Buffer::device(&queue, 64).unwrap();
    let view = own.matrix(0, (4, 4), DType::F32).unwrap();
    fill(&device, view, 1.0).unwrap();
    let strided = Tensor::zeros((4, 4), DType::U8, &device).unwrap().t().unwrap();
    assert!(Buffer::of_tensor(strided.clone()).is_err());
    assert_eq!(download_u8(&strided.contiguous().unwrap()).unwrap(), [0; 16]);
}

/// Run it alone: it prints what holds the memory of a GPU after each of the things that a run does first, and what a smaller
/// stack of the threads, whose memory the context keeps for all that can be resident, leaves of the context.
#[test]
#[ignore = "gpu"]
#[expect(clippy::print_stdout, reason = "a table for the reader")]
fn bench_footprint() {
    use cudarc::driver::sys::{CUlimit, cuCtxGetLimit, cuCtxSetLimit};
    use trainer::device::{Footprint, footprint, synchronize};
    use trainer::kernels::cuda::{Accumulate, Side, gemm};

    let device = device();
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let print = |what: &str| {
        synchronize(&device).unwrap();
        let Footprint { tensors, slack, opening, loaded } = footprint(&device).unwrap();
        let [tensors, slack, opening, loaded] = [tensors, slack, opening, loaded].map(mib);
        println!("{what:28} tensors {tensors:7.1} slack {slack:7.1} opening {opening:7.1} loaded {loaded:7.1} MiB");
    };
    print("opened");
    let x = empty(&device, (2048, 2048), DType::BF16).unwrap();
    fill(&device, matrix(&x).unwrap(), 0.5).unwrap();
    print("first kernel");
    let y = empty(&device, (2048, 2048), DType::BF16).unwrap();
    let (a, b) = ((matrix(&x).unwrap(), Side::Plain), (matrix(&x).unwrap(), Side::Transposed));
    gemm(&device, matrix(&y).unwrap(), a, b, 1.0, Accumulate::No, None).unwrap();
    print("first product");
    let mut stack = 0;
    // SAFETY: a number is written to a live variable; the limit is one of the context that is current here.
    unsafe {
        cuCtxGetLimit(&raw mut stack, CUlimit::CU_LIMIT_STACK_SIZE).result().unwrap();
        cuCtxSetLimit(CUlimit::CU_LIMIT_STACK_SIZE, 256).result().unwrap();
    }
    print(&format!("stack {stack} -> 256 bytes"));
    gemm(&device, matrix(&y).unwrap(), a, b, 1.0, Accumulate::No, None).unwrap();
    fill(&device, matrix(&x).unwrap(), 0.5).unwrap();
    print("kernel and product again");
    // SAFETY: as above.
    unsafe { cuCtxSetLimit(CUlimit::CU_LIMIT_STACK_SIZE, stack) }.result().unwrap();
}
