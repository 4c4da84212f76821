-- The recipe as one message: what is added to it needs no column here.
alter table version add column recipe bytea;                 -- detflow.v1.Recipe, defaults resolved

create function protobuf_varint(number bigint) returns bytea immutable language plpgsql as $$
declare
  rest bigint := number;
  made bytea := '';
begin
  while (rest & ~127::bigint) <> 0 loop
    made := made || set_byte('\x00', 0, (rest & 127)::int | 128);
    rest := (rest >> 7) & 144115188075855871;                -- 57 bits: the shift is to fill up with zeros
  end loop;
  return made || set_byte('\x00', 0, rest::int);
end
$$;

update version set recipe =
  '\x0a06'::bytea                                            -- split: 6 bytes, for each share is below 128
  || '\x08' || protobuf_varint(percentages[1])
  || '\x10' || protobuf_varint(percentages[2])
  || '\x18' || protobuf_varint(percentages[3])
  || case when max_side_px = 0 then '' else '\x10' || protobuf_varint(max_side_px) end
  || case when grayscale then '\x1801'::bytea else '' end
  || case when augmentations = '{}' then ''
     else '\x22' || protobuf_varint(cardinality(augmentations)) || (
       select string_agg(
         protobuf_varint(array_position(
           array['AUGMENTATION_FLIP_LEFT_RIGHT', 'AUGMENTATION_FLIP_UP_DOWN', 'AUGMENTATION_ROTATE_90',
                 'AUGMENTATION_ROTATE_180', 'AUGMENTATION_ROTATE_270'], name)),
         '' order by place)
       from unnest(augmentations) with ordinality as listed (name, place))
     end
  || case when seed = 0 then '' else '\x28' || protobuf_varint(seed) end;

drop function protobuf_varint;
alter table version
  alter column recipe set not null,
  drop column percentages,
  drop column max_side_px,
  drop column grayscale,
  drop column augmentations,
  drop column seed;
