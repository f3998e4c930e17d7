package worker

import (
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// valid replaces what is not UTF-8. A message with it cannot be sent: the worker would connect again for ever.
func valid(text string) string { return strings.ToValidUTF8(text, "\uFFFD") }

// validated is a copy of a message whose texts are UTF-8.
func validated[M proto.Message](message M) M {
	made := proto.Clone(message).(M)
	mend(made.ProtoReflect())
	return made
}

func mend(message protoreflect.Message) {
	message.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		switch {
		case field.IsMap():
			mended := message.NewField(field).Map()
			value.Map().Range(func(key protoreflect.MapKey, value protoreflect.Value) bool {
				if text, isText := key.Interface().(string); isText {
					key = protoreflect.ValueOfString(valid(text)).MapKey()
				}
				mended.Set(key, mendedValue(value))
				return true
			})
			message.Set(field, protoreflect.ValueOfMap(mended))
		case field.IsList():
			for list, n := value.List(), 0; n < list.Len(); n++ {
				list.Set(n, mendedValue(list.Get(n)))
			}
		default:
			message.Set(field, mendedValue(value))
		}
		return true
	})
}

func mendedValue(value protoreflect.Value) protoreflect.Value {
	switch content := value.Interface().(type) {
	case string:
		return protoreflect.ValueOfString(valid(content))
	case protoreflect.Message:
		mend(content)
	}
	return value
}
