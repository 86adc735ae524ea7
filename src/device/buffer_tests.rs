use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::{Buffer, Part, Place};
use crate::device::{Queue, Ticket};

fn filled(bytes: &[u8]) -> Arc<Buffer> {
    let mut buffer = Buffer::host(bytes.len());
    buffer.write(0, bytes).unwrap();
    Arc::new(buffer)
}

fn read(part: &Part) -> Vec<u8> {
    part.buffer().with_bytes(|all| all[part.bytes()].to_vec()).unwrap()
}

#[test]
fn on_the_cpu_every_place_is_host_memory_and_a_copy_is_done_at_once() {
    let queue = Queue::of(&Device::Cpu).unwrap();
    let from = filled(&[1, 2, 3, 4, 5, 6]);
    for to in [Buffer::device(&queue, 4).unwrap(), Buffer::pinned(&queue, 4).unwrap(), Buffer::host(4)] {
        assert_eq!((to.place(), to.len()), (Place::Host, 4));
        let to = Arc::new(to);
        let (source, target) = (from.part(2..4).unwrap(), to.part(1..3).unwrap());
        let ticket = queue.copy(&source, &target, &Ticket::done()).unwrap();
        assert!(ticket.is_done().unwrap());
        assert_eq!(read(&to.whole()), [0, 3, 4, 0]);
    }
}

#[test]
fn a_copy_comes_after_the_work_of_a_thread() {
    let (work, ticket) = Ticket::promise();
    let to = Arc::new(Buffer::host(2));
    let target = to.whole();
    let copying = std::thread::spawn(move || {
        let queue = Queue::of(&Device::Cpu).unwrap();
        queue.copy(&filled(&[7, 8]).whole(), &target, &ticket).map(drop)
    });
    std::thread::sleep(std::time::Duration::from_millis(5));
    assert_eq!(read(&to.whole()), [0, 0]);
    work.done();
    copying.join().unwrap().unwrap();
    assert_eq!(read(&to.whole()), [7, 8]);
}

#[test]
fn a_copy_is_refused_where_it_does_not_fit() {
    let queue = Queue::of(&Device::Cpu).unwrap();
    let (left, right) = (filled(&[0; 4]), filled(&[0; 4]));
    let part = |buffer: &Arc<Buffer>, bytes| buffer.part(bytes).unwrap();
    let refused = |from: &Part, to: &Part| queue.copy(from, to, &Ticket::done()).unwrap_err().to_string();
    assert!(refused(&part(&left, 0..2), &part(&right, 0..3)).contains("2 bytes"));
    assert!(refused(&part(&left, 0..2), &part(&left, 2..4)).contains("another buffer"));
    assert!(left.part(3..5).is_err());
    let (work, ticket) = Ticket::promise();
    drop(work);
    assert!(queue.copy(&left.whole(), &right.whole(), &ticket).is_err(), "after work that was given up");
}

#[test]
fn two_threads_copy_between_two_buffers_both_ways() {
    let (left, right) = (filled(&[1; 64]), filled(&[1; 64]));
    std::thread::scope(|scope| {
        for (from, to) in [(&left, &right), (&right, &left)] {
            scope.spawn(move || {
                let queue = Queue::of(&Device::Cpu).unwrap();
                for _ in 0..1000 {
                    queue.copy(&from.whole(), &to.whole(), &Ticket::done()).unwrap();
                }
            });
        }
    });
    assert_eq!(read(&left.whole()), [1; 64]);
}

#[test]
fn numbers_are_written_as_their_bytes_at_a_multiple_of_64() {
    let mut buffer = Buffer::host(12);
    buffer.write(4, &[1.5f32, -2.0]).unwrap();
    let want: Vec<u8> = [0f32, 1.5, -2.0].iter().flat_map(|value| value.to_le_bytes()).collect();
    assert_eq!(buffer.with_bytes(<[u8]>::to_vec).unwrap(), want);
    assert!(buffer.write(8, &[1u64]).is_err());
    assert!(buffer.with_bytes(|bytes| bytes.as_ptr().addr().is_multiple_of(64)).unwrap());
}

#[test]
fn kernels_get_no_view_of_memory_that_they_do_not_reach() {
    let buffer = Buffer::host(64);
    assert!(buffer.matrix(0, (4, 4), DType::F32).unwrap_err().to_string().contains("kernels"));
    assert!(buffer.matrix(0, (4, 5), DType::F32).unwrap_err().to_string().contains("64 bytes"));
    assert!(buffer.array(2, 1, DType::F32).unwrap_err().to_string().contains("multiples of 4"));
    assert!(Buffer::of_tensor(Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap()).is_err());
}
