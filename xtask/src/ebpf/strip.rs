//! Takes the debugging sections out of an ELF object: the kernel never sees them, and they are nine tenths of its size.
//!
//! Sections are emptied (`SHT_NULL`) rather than removed, so no index in the file changes. Type information for the kernel
//! (`.BTF`, `.BTF.ext`) stays.

use anyhow::{Context as _, Result, ensure};

/// Layout of ELF64, little endian: System V gABI, "Object Files".
const HEADER: usize = 64;
const SECTION_HEADER: usize = 64;
const SHT_NULL: u32 = 0;
const SHT_NOBITS: u32 = 8;

/// One section header, as far as it matters here.
#[derive(Clone, Copy)]
struct Section {
    /// Where its header lies.
    header: usize,
    name: u32,
    kind: u32,
    offset: usize,
    size: usize,
    align: usize,
}

/// Returns `object` without `.debug_*` sections and their relocations.
pub(crate) fn strip_debug(object: &[u8]) -> Result<Vec<u8>> {
    ensure!(object.get(..6) == Some(b"\x7fELF\x02\x01"), "not an ELF object of 64 bits, little endian");
    let table = read_u64(object, 40)?;
    let count = usize::from(read_u16(object, 60)?);
    let names_index = usize::from(read_u16(object, 62)?);
    let sections = (0..count)
        .map(|index| section(object, table.saturating_add(index * SECTION_HEADER)))
        .collect::<Result<Vec<_>>>()?;
    let names = sections.get(names_index).context("no section of names")?;

    let mut out = object.get(..HEADER).context("truncated header")?.to_vec();
    let mut headers = range(object, table, count * SECTION_HEADER)?.to_vec();
    for section in &sections {
        let at = section.header - table;
        let name = text(object, names.offset.saturating_add(section.name as usize))?;
        if name.starts_with(b".debug_") || name.starts_with(b".rel.debug_") {
            headers[at + 4..at + SECTION_HEADER].fill(0);
        } else if section.kind != SHT_NULL && section.kind != SHT_NOBITS {
            let contents = range(object, section.offset, section.size)?;
            out.resize(out.len().next_multiple_of(section.align.max(1)), 0);
            headers[at + 24..at + 32].copy_from_slice(&(out.len() as u64).to_le_bytes());
            out.extend_from_slice(contents);
        }
    }
    out.resize(out.len().next_multiple_of(8), 0);
    let table = out.len() as u64;
    out[40..48].copy_from_slice(&table.to_le_bytes());
    out.extend_from_slice(&headers);
    Ok(out)
}

fn section(object: &[u8], header: usize) -> Result<Section> {
    Ok(Section {
        header,
        name: read_u32(object, header)?,
        kind: read_u32(object, header.saturating_add(4))?,
        offset: read_u64(object, header.saturating_add(24))?,
        size: read_u64(object, header.saturating_add(32))?,
        align: read_u64(object, header.saturating_add(48))?,
    })
}

fn text(object: &[u8], at: usize) -> Result<&[u8]> {
    object.get(at..).and_then(|rest| rest.split(|byte| *byte == 0).next()).context("name outside the object")
}

fn range(object: &[u8], at: usize, length: usize) -> Result<&[u8]> {
    at.checked_add(length).and_then(|end| object.get(at..end)).with_context(|| format!("truncated at {at}"))
}

fn read<const N: usize>(object: &[u8], at: usize) -> Result<[u8; N]> {
    Ok(range(object, at, N)?.try_into().expect("as long as asked for"))
}

fn read_u16(object: &[u8], at: usize) -> Result<u16> {
    read(object, at).map(u16::from_le_bytes)
}

fn read_u32(object: &[u8], at: usize) -> Result<u32> {
    read(object, at).map(u32::from_le_bytes)
}

fn read_u64(object: &[u8], at: usize) -> Result<usize> {
    usize::try_from(read(object, at).map(u64::from_le_bytes)?).context("offset out of range")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stripping_twice_changes_nothing_more() {
        let object = std::fs::read(super::super::sources::object_path()).expect("the object is in the tree");
        assert_eq!(strip_debug(&object).expect("a stripped object is an object"), object);
    }

    #[test]
    fn what_is_not_an_object_is_refused() {
        assert!(strip_debug(b"").is_err());
        assert!(strip_debug(&[0; 128]).is_err());
        let mut truncated = b"\x7fELF\x02\x01".to_vec();
        truncated.resize(64, 0xff);
        assert!(strip_debug(&truncated).is_err());
    }
}
