//! Damaged and malicious files: an error that says what is wrong, and no more memory than the file's size and 64 MiB.

use std::path::Path;

use crate::write::{Pickle, floats, legacy, mxnet, read, safetensors, zip};

const FOUR: [f32; 4] = [1.0, 2.0, 3.0, 4.0];
const CHILD: &str = "KD_WEIGHTS_HOSTILE";

/// The state dict `{"w": tensor}`.
fn one(build: impl FnOnce(Pickle) -> Pickle) -> Vec<u8> {
    build(Pickle::new().dict().text("w")).end().stop()
}

/// A zip whose tensor of four elements claims to be another.
fn claim(numel: i64, offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    zip(&one(|p| p.tensor(("0", "FloatStorage", numel), offset, shape, strides)), &[("0", &floats(&FOUR))])
}

fn replace(mut bytes: Vec<u8>, from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let places: Vec<usize> = (0..=bytes.len() - from.len()).filter(|&i| bytes[i..].starts_with(from)).collect();
    assert!(!places.is_empty());
    places.into_iter().for_each(|i| bytes[i..i + to.len()].copy_from_slice(to));
    bytes
}

/// Of each file its name, its bytes, and a part of the message.
fn files() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let bytes = floats(&FOUR);
    let good = one(|p| p.vector("0", 4));
    let pkl = |pickle: Pickle| zip(&pickle.stop(), &[]);
    let bomb = (0..40).fold(Pickle::new().raw(b")q\x00"), |p, _| p.raw(b"h\x00h\x00\x86q\x00"));
    let two = one(|p| p.vector("0", 4).text("v").vector("1", 4));
    let two = zip(&two, &[("0", &bytes), ("1", &bytes)]);
    // The directory's entry of the second storage, led to the first one's data.
    let overlap = {
        let mut file = two.clone();
        let entries: Vec<usize> = (0..file.len()).filter(|&i| file[i..].starts_with(b"PK\x01\x02")).collect();
        let (third, fourth) = (entries[2] + 42, entries[3] + 42);
        file.copy_within(third..third + 4, fourth);
        file
    };
    let compressed = {
        let mut file = zip(&good, &[("0", &bytes)]);
        let at: Vec<usize> = (0..file.len()).filter(|&i| file[i..].starts_with(b"PK\x01\x02")).collect();
        file[at[0] + 10] = 8;
        file
    };
    let views = (1..100).fold(Pickle::new().dict(), |p, i| p.text(&i.to_string()).tensor(("0", "FloatStorage", 4), 0, &[2, 2], &[1, 2]));
    let header = |fields: &str| safetensors(fields, &bytes);
    let entry = r#"{"dtype":"F32","shape":[4],"data_offsets":[0,16]}"#;
    let mx = mxnet(&[("arg:w", &[4], &FOUR)]);
    vec![
        ("empty", vec![], "begins with \"\""),
        ("wrong magic", b"<!DOCTYPE html><html>".to_vec(), "<!DOCTYPE html"),
        ("one byte", vec![0x80], "not a weight file"),
        ("a pickle of another program", Pickle::new().dict().end().stop(), "magic number"),
        ("another legacy protocol", replace(legacy(&good, &[("0", 4, &bytes)]), b"M\xe9\x03.", b"M\xea\x03."), "protocol"),
        ("legacy, big-endian", replace(legacy(&good, &[("0", 4, &bytes)]), b"endian\x88", b"endian\x89"), "byte order"),
        ("legacy, another count", legacy(&good, &[("0", 5, &bytes)]), "5 elements"),
        ("legacy, a huge count", legacy(&one(|p| p.vector("0", 1 << 60)), &[("0", 1 << 60, &bytes)]), "the file has"),
        ("legacy, a negative count", legacy(&good, &[("0", -4, &bytes)]), "-4 elements"),
        ("legacy, listed twice", legacy(&good, &[("0", 4, &bytes), ("0", 4, &bytes)]), "listed twice"),
        ("legacy, not listed", legacy(&good, &[]), "not in the file's list"),
        ("legacy, of no tensor", legacy(&good, &[("0", 4, &bytes), ("7", 4, &bytes)]), "belongs to no tensor"),
        ("legacy, more behind", [legacy(&good, &[("0", 4, &bytes)]), vec![0]].concat(), "end at byte"),
        ("no pickle", b"PK\x05\x06".iter().copied().chain([0; 18]).collect(), "data.pkl"),
        ("half a zip", two[..two.len() / 2].to_vec(), "damaged zip"),
        ("overlapping entries", overlap, "overlap"),
        ("two entries of a name", replace(two.clone(), b"net/data/1", b"net/data/0"), "same name"),
        ("a compressed entry", compressed, "compressed"),
        ("a missing storage", zip(&good, &[]), "net/data/0 is missing"),
        ("a short storage", zip(&good, &[("0", &bytes[..12])]), "12 bytes; its tensors declare 16"),
        ("zip, big-endian", replace(zip(&good, &[("0", &bytes)]), b"little", b"biggie"), "byteorder"),
        ("memo bomb", pkl(bomb), "a tuple, not a state dict"),
        ("two million tuples in tuples", pkl(Pickle::new().raw(b")").raw(&vec![0x85; 2_000_000])), "levels"),
        ("two million marks", pkl(Pickle::new().raw(&vec![b'('; 2_000_000])), "levels"),
        ("two million lists in lists", pkl(Pickle::new().raw(&b"](".repeat(2_000_000))), "levels"),
        ("two million values", pkl(Pickle::new().raw(&vec![b'N'; 2_000_000])), "more than 1000000 opcodes"),
        ("a million dictionaries", pkl(Pickle::new().raw(&vec![b'}'; 999_998])), "no tensor"),
        ("dictionaries of one", pkl(Pickle::new().raw(&b"}NNs".repeat(249_999))), "its keys: None"),
        (
            "a million memos",
            pkl((0..499_998u32).fold(Pickle::new().raw(b"}"), |p, i| p.raw(b"r").raw(&(i * 8191).to_le_bytes()))),
            "no tensor",
        ),
        ("a text of 4 GiB", pkl(Pickle::new().raw(b"X\xff\xff\xff\xff")), "cut short"),
        ("a text of 8 EiB", pkl(Pickle::new().raw(&[0x8d]).raw(&[0xff; 8])), "cut short"),
        ("an integer of 255 bytes", pkl(Pickle::new().raw(&[0x8a, 255]).raw(&[1; 255])), "an integer of 255 bytes"),
        ("an integer of 4 GiB", pkl(Pickle::new().raw(b"\x8b\xff\xff\xff\xff")), "an integer of 4294967295 bytes"),
        ("a memo that is not there", pkl(Pickle::new().raw(b"h\x05")), "before it is made"),
        ("a value taken below a mark", pkl(Pickle::new().raw(b"N(0")), "a value is missing"),
        ("an unknown opcode", pkl(Pickle::new().raw(b"i")), "opcode 0x69"),
        ("a dictionary in itself", pkl(Pickle::new().raw(b"}q\x00").text("w").raw(b"h\x00s")), "no tensor"),
        ("os.system", pkl(Pickle::new().global("os", "system").raw(b"(").text("id").raw(b"tR")), "os.system"),
        ("os.system aside", pkl(Pickle::new().dict().text("w").vector("0", 4).text("x").global("posix", "system").end()), "posix.system"),
        ("eval aside", pkl(Pickle::new().dict().text("x").raw(b"\x8c\x08builtins\x8c\x04eval\x93").end()), "builtins.eval"),
        ("an object of a class", pkl(Pickle::new().global("my", "Net").raw(b")\x81")), "my.Net, not a state dict"),
        ("a function unknown to make tensors", zip(&one(|p| p.global("torch._utils", "_rebuild_sparse").raw(b")R")), &[]), "no tensor"),
        (
            "such a function among tensors",
            zip(&one(|p| p.vector("0", 4).text("s").global("torch._utils", "_rebuild_sparse").raw(b")R")), &[("0", &bytes)]),
            "`s` is an object made by torch._utils._rebuild_sparse, not a tensor",
        ),
        ("a number among tensors", zip(&one(|p| p.vector("0", 4).text("n").int(3)), &[("0", &bytes)]), "`n` is the number 3"),
        ("a key that is a number", zip(&one(|p| p.vector("0", 4).int(3).vector("0", 4)), &[("0", &bytes)]), "not a text"),
        ("a key twice", zip(&one(|p| p.vector("0", 4).text("w").vector("0", 4)), &[("0", &bytes)]), "`w` occurs twice"),
        ("a long name", zip(&one(|p| p.vector("0", 4).text(&"n".repeat(10_001)).vector("0", 4)), &[("0", &bytes)]), "10001 bytes"),
        ("a shape of 275 GB", claim(4, 0, &[1 << 20, 1 << 16], &[1 << 16, 1]), "over storage `0` of 4"),
        ("a shape of 4 TB", claim(4, 0, &[1 << 20, 1 << 20], &[1 << 20, 1]), "over storage `0` of 4"),
        ("a shape beyond 64 bits", claim(4, 0, &[1 << 40, 1 << 40], &[1, 1]), "over storage"),
        ("such a shape behind a 0", claim(4, 0, &[0, 1 << 40, 1 << 40], &[1, 1, 1]), "over storage"),
        ("a storage of 4 TB", claim(1 << 40, 0, &[1 << 20, 1 << 20], &[1 << 20, 1]), "its tensors declare"),
        ("a storage beyond 64 bits", claim(i64::MAX, 0, &[4], &[1]), "elements"),
        ("a negative size", claim(4, 0, &[-4], &[1]), "the size -4"),
        ("a negative stride", claim(4, 0, &[4], &[-1]), "the size -1"),
        ("a negative offset", claim(4, -1, &[4], &[1]), "the size -1"),
        ("a negative storage", claim(-4, 0, &[4], &[1]), "the size -4"),
        ("an offset past the end", claim(4, 1, &[4], &[1]), "offset 1"),
        ("a stride past the end", claim(4, 0, &[2], &[4]), "strides [4]"),
        ("a stride beyond 64 bits", claim(4, 0, &[3], &[i64::MAX]), "strides"),
        ("one element repeated", claim(4, 0, &[1 << 30], &[0]), "over storage"),
        ("more sizes than strides", claim(4, 0, &[2, 2], &[1]), "strides [1]"),
        ("a hundred dimensions", claim(4, 0, &[1; 100], &[1; 100]), "strides"),
        ("copies without end", zip(&views.end().stop(), &[("0", &bytes)]), "hold more than it does"),
        (
            "a storage of two types",
            zip(&one(|p| p.vector("0", 4).text("v").tensor(("0", "IntStorage", 4), 0, &[4], &[1])), &[("0", &bytes)]),
            "declared twice",
        ),
        ("complex numbers", zip(&one(|p| p.tensor(("0", "ComplexFloatStorage", 2), 0, &[2], &[1])), &[("0", &bytes)]), "not supported"),
        ("no header", safetensors("{}", &[]), "no tensor"),
        ("a header of 1 EiB", [&(1u64 << 60).to_le_bytes()[..], b"{}"].concat(), "not a weight file"),
        ("a header of 40 MB", safetensors(&format!("{{{}}}", " ".repeat(40_000_000)), &[]), "more than 33554432"),
        ("no JSON", header("{nonsense}"), "safetensors header"),
        ("a safetensors key twice", header(&format!(r#"{{"w":{entry},"w":{entry}}}"#)), "`w` occurs twice"),
        ("overlapping tensors", header(&format!(r#"{{"w":{entry},"v":{entry}}}"#)), "invalid offset"),
        ("a hole", header(r#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[12,16]}}"#), "invalid offset"),
        ("trailing bytes", header(r#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#), "declares 4 bytes"),
        ("missing bytes", header(r#"{"w":{"dtype":"F32","shape":[5],"data_offsets":[0,20]}}"#), "declares 20 bytes"),
        ("another shape", header(r#"{"w":{"dtype":"F32","shape":[5],"data_offsets":[0,16]}}"#), "safetensors header"),
        (
            "a shape that overflows",
            header(r#"{"w":{"dtype":"F32","shape":[9223372036854775807,3],"data_offsets":[0,16]}}"#),
            "safetensors header",
        ),
        (
            "an overflow behind a 0",
            header(
                r#"{"v":{"dtype":"F32","shape":[0,9223372036854775807,9223372036854775807],"data_offsets":[0,0]},
                "w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#,
            ),
            "`v`: 0 bytes for a shape",
        ),
        ("complex safetensors", header(r#"{"w":{"dtype":"C64","shape":[2],"data_offsets":[0,16]}}"#), "type C64"),
        ("another array magic", replace(mx.clone(), &0xf993_fac9u32.to_le_bytes(), &0xf993_fac8u32.to_le_bytes()), "0xf993fac8"),
        ("a sparse array", mxnet(&[("w", &[], &[])]), "0 dimensions"),
        ("a negative array", mxnet(&[("w", &[-4], &FOUR)]), "a dimension of -4"),
        ("a huge array", mxnet(&[("w", &[1 << 40], &FOUR)]), "cut short"),
        ("an endless array", mxnet(&[("w", &[1 << 40, 1 << 40], &FOUR)]), "a shape of"),
        ("arrays without end", [&[0x112, 0, u64::MAX].map(u64::to_le_bytes).concat()[..], &[0; 9]].concat(), "more than 100000"),
        ("an array twice", mxnet(&[("w", &[4], &FOUR), ("w", &[4], &FOUR)]), "`w` occurs twice"),
        ("array names cut short", mx[..mx.len() - 1].to_vec(), "cut short"),
        ("more behind the names", [mx, vec![0]].concat(), "ends at byte"),
    ]
}

/// Most bytes of memory that this process ever used.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

#[test]
fn hostile_files_are_errors() {
    for (name, bytes, message) in files() {
        let error = read(&bytes).expect_err(name).to_string();
        assert!(error.contains(message) && error.contains("/weights: "), "{name}: {error}");
        assert!(error.len() < 1000, "{name}: {error}");
    }
}

/// Each in a process of its own, whose address space ends at 1 GB: a file that makes its reader ask for what it declares ends it.
#[cfg(target_os = "linux")]
#[test]
fn hostile_files_take_no_more_memory_than_they_have() {
    if let Ok(path) = std::env::var(CHILD) {
        let before = peak();
        assert!(kd_weights::read(Path::new(&path)).is_err());
        println!("\ntook {}", peak() - before);
        return;
    }
    let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
    let (mut count, mut most) = (0, 0);
    for (name, bytes, _) in files() {
        std::fs::write(&path, &bytes).unwrap();
        let child = std::process::Command::new("sh")
            .args(["-c", "ulimit -v 1000000 && exec \"$@\"", "sh"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "hostile::hostile_files_take_no_more_memory_than_they_have", "--nocapture", "--test-threads=1"])
            .env(CHILD, &path)
            .output()
            .unwrap();
        let output = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success(), "{name}: {output}{}", String::from_utf8_lossy(&child.stderr));
        let took: u64 = output.lines().find_map(|l| l.strip_prefix("took ")).unwrap().parse().unwrap();
        assert!(took < bytes.len() as u64 + (64 << 20), "{name}: {took} bytes of memory for {} bytes", bytes.len());
        (count, most) = (count + 1, most.max(took));
    }
    println!("{count} hostile files, at most {most} bytes of memory for one");
}

#[test]
fn what_is_no_plain_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let error = kd_weights::read(folder.path()).unwrap_err().to_string();
    assert!(error.contains("a folder") && error.contains(&folder.path().display().to_string()), "{error}");
    let error = kd_weights::read(&folder.path().join("absent.pth")).unwrap_err().to_string();
    assert!(error.contains("absent.pth"), "{error}");
    if cfg!(unix) {
        assert!(kd_weights::read(Path::new("/dev/zero")).unwrap_err().to_string().contains("not a plain file"));
    }
}

/// One small file of each format.
fn specimens() -> Vec<Vec<u8>> {
    let bytes = floats(&FOUR);
    let pickle = Pickle::new().dict().text("a").vector("0", 4).text("b").tensor(("0", "FloatStorage", 4), 0, &[2, 2], &[1, 2]).end().stop();
    vec![
        zip(&pickle, &[("0", &bytes)]),
        legacy(&pickle, &[("0", 4, &bytes)]),
        mxnet(&[("arg:a", &[4], &FOUR), ("arg:b", &[2, 2], &FOUR)]),
        safetensors(r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#, &bytes),
    ]
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    for file in specimens() {
        assert!(read(&file).is_ok());
        for len in 0..file.len() {
            assert!(read(&file[..len]).is_err(), "{len} of {} bytes", file.len());
        }
    }
}

/// Whatever byte is wrong: an answer, never a panic; and what is read is no larger than the file.
#[test]
fn a_wrong_byte_is_survived() {
    let mut refused = 0;
    for file in specimens() {
        for (at, flip) in (0..file.len()).flat_map(|at| [0x01, 0x80, 0xff].map(|flip| (at, flip))) {
            let mut bytes = file.clone();
            bytes[at] ^= flip;
            match read(&bytes) {
                Ok(found) => assert!(found.tensors.iter().all(|(_, t)| t.elem_count() <= 4)),
                Err(_) => refused += 1,
            }
        }
    }
    assert!(refused > 1000, "{refused}");
}
