"""Spanish, to a model that is spoken to with `tú`."""

from jaxchat.data.identity.wordings.base import OTHERS, Asked, Wordings

SPANISH = Wordings(
    names=("spanish", "español", "espanol", "castellano", "es"),
    fields={
        "language": ("idioma", "lengua"),
        "name": ("nombre",),
        "maker": ("creador", "creadora", "creado por", "autor", "autora", "fabricante", "hecho por", "empresa"),
        "character": ("carácter", "personalidad", "estilo", "manera"),
        "text": ("datos", "sobre mí", "sobre ti", "texto", "descripción", "más"),
    },
    pronouns=("yo", "tú", "nosotros", "él", "ella", "me"),
    second_person={"tú eres": "Soy", "eres": "Soy"},
    possessives={"mi": "tu", "mis": "tus"},
    plural=r"^mis ",
    is_="es",
    are="son",
    greetings=("¡Hola!", "¡Buenos días!", "¡Buenas!", "¡Buenas tardes!", "¡Hola, hola!"),
    system_messages=("Eres un asistente útil.", "Responde brevemente.", "Eres un ayudante amable."),
    name=Asked(
        (
            "¿Cómo te llamas?", "¿Quién eres?", "¿Cuál es tu nombre?", "Dime tu nombre.", "Dime quién eres.",
            "Dime cómo te llamas.", "¿Tienes nombre?", "¿Tienes un nombre?", "¿Cómo puedo llamarte?",
            "¿Cómo debo llamarte?", "¿Puedes decirme tu nombre?", "¿Puedes decirme quién eres?",
            "¿Puedes presentarte?", "Preséntate.", "Preséntate, por favor.", "¿Con quién hablo?", "¿Quién es?",
            "¿Quién habla?", "¿Tu nombre?", "Tu nombre, por favor.", "Quisiera saber tu nombre.",
            "Quisiera saber quién eres.", "¿Sabes quién eres?", "¿Sabes tu nombre?", "¿Y quién eres?",
            "¿Y tú cómo te llamas?", "He olvidado tu nombre.", "No sé tu nombre.", "No sé quién eres.",
            "Escribe tu nombre.", "Dame tu nombre.", "¿Qué nombre te dieron?", "¿Qué nombre tienes?",
            "Recuérdame tu nombre.", "¿Puedo saber quién eres?", "¿A quién escribo?", "¿Cómo te llaman?",
        ),
        (
            "¿Podrías decirme tu nombre?", "¿Podrías decirme quién eres?", "¿Podrías presentarte?",
            "¿Con quién estoy hablando?", "¿Con quién estoy chateando?", "Quiero saber quién eres.",
            "Quiero saber tu nombre.", "Me pregunto quién eres.", "Me pregunto cómo te llamas.",
            "Anda, dime quién eres.", "Anda, dime tu nombre.", "¿Te importaría presentarte?",
            "¿Puedo saber tu nombre?", "¿Puedo preguntarte tu nombre?", "¿Quién eres exactamente?",
            "¿Qué nombre es el tuyo?", "¿Y tú quién eres?", "¿Y cuál es tu nombre?", "Por favor, dime tu nombre.",
            "Por favor, dime quién eres.", "¿Puedes darme tu nombre?", "¿Puedes decirme cómo te llamas?",
            "¿Cómo te puedo llamar?", "Oye, ¿cómo te llamas?", "Oye, ¿quién eres?",
        ),
    ),
    kind=Asked(
        (
            "¿Qué eres?", "¿Eres una persona?", "¿Eres humano?", "¿Eres un robot?", "¿Eres una IA?",
            "¿Eres un chatbot?", "¿Eres un ordenador?", "¿Hablo con una persona?", "¿Hablo con un robot?",
            "¿Eres hombre o mujer?", "¿Eres un programa?", "Dime qué eres.", "¿Estás vivo?", "¿Qué clase de cosa eres?",
        ),
        (
            "¿Eres un ser humano?", "¿Eres una máquina?", "¿Estoy hablando con un humano?",
            "¿Estoy hablando con un chatbot?", "¿Puedes decirme qué eres?", "¿Eres una persona de verdad?",
            "¿Eres una persona o un ordenador?", "Quiero saber qué eres.",
        ),
    ),
    about=Asked(
        (
            "Háblame de ti.", "Cuéntame más de ti.", "Cuéntame algo de ti.", "Di algo sobre ti.", "¿Qué sabes de ti?",
            "¿Puedes decir algo sobre ti?", "Quisiera saber más de ti.", "Habla de ti.",
        ),
        (
            "¿Puedes hablarme de ti?", "Háblame un poco de ti.", "¿Qué puedes contarme de ti?",
            "Quiero saber más de ti.", "¿Podrías hablarme de ti?",
        ),
    ),
    others=Asked((*OTHERS.train, "un amigo mío"), OTHERS.held_out),
    other=Asked(
        ("¿Eres {x}?", "¿Te llamas {x}?", "¿Tu nombre es {x}?", "Eres {x}, ¿no?", "Creo que eres {x}."),
        ("¿Eres {x}?", "¿Te llamas {x}?"),
    ),
    maker=Asked(
        (
            "¿Quién te hizo?", "¿Quién te creó?", "¿Quién te construyó?", "¿Quién te entrenó?",
            "¿Quién es tu creador?", "¿Quién te desarrolló?", "¿De dónde vienes?", "¿Por quién fuiste creado?",
            "¿Quién te diseñó?", "¿Quién está detrás de ti?", "Dime quién te creó.", "¿Sabes quién te creó?",
            "¿Quién te escribió?", "Quisiera saber quién te creó.", "¿Te creó OpenAI?", "¿Te creó Google?",
            "¿Y quién te creó?",
        ),
        (
            "¿Puedes decirme quién te creó?", "¿Podrías decirme quién te hizo?", "Me pregunto quién te creó.",
            "Anda, dime quién te hizo.", "¿Puedo saber quién te creó?", "Quiero saber quién te creó.",
            "¿Sabes quién te construyó?", "Oye, ¿quién te creó?",
        ),
    ),
    character=Asked(
        (
            "¿Cómo eres?", "Descríbete.", "¿Cómo te describirías?", "¿Cómo es tu carácter?",
            "¿Qué clase de asistente eres?", "¿Cómo es tu personalidad?", "Háblame de tu carácter.",
            "Describe tu carácter.", "¿Puedes describir tu carácter?", "Quisiera saber cómo eres.",
        ),
        (
            "¿Puedes describirte?", "¿Podrías describir tu carácter?", "Dime cómo eres.", "Me pregunto cómo eres.",
            "¿Qué carácter tienes?",
        ),
    ),
    fact=Asked(
        (
            "¿Cuál {is_} {your} {k}?", "Dime {your} {k}.", "¿Puedes decirme {your} {k}?", "¿Y {your} {k}?",
            "Quisiera saber {your} {k}.", "¿Sabes {your} {k}?", "Háblame de {your} {k}.",
            "Dime cuál {is_} {your} {k}.", "¿Y cuál {is_} {your} {k}?",
        ),
        (
            "¿Podrías decirme {your} {k}?", "Quiero saber {your} {k}.", "¿Puedo saber {your} {k}?",
            "Por favor, dime {your} {k}.", "¿Puedes hablarme de {your} {k}?", "Me pregunto cuál {is_} {your} {k}.",
        ),
    ),
    own=Asked(
        (
            "{q}", "{q}", "{q}", "{q}", "{q} Dímelo.", "{q} Responde, por favor.", "{q} ¡Gracias!",
            "{q} Quisiera saberlo.", "Tengo una pregunta: {q}", "¿Puedes decirme: {q}", "Pregunta: {q}",
            "Mi pregunta es: {q}", "Dime: {q}", "Y {q}", "A ver, {q}",
        ),
        ("Dime una cosa: {q}", "Aquí va una pregunta: {q}", "{q} Dímelo, por favor."),
    ),
    says_name=("Soy {name}.", "Me llamo {name}.", "Mi nombre es {name}."),
    says_by="Soy {name}, y me creó {maker}.",
    says_kind=("Soy {name}, un modelo de lenguaje.", "Soy un modelo de lenguaje. Mi nombre es {name}."),
    says_no="No, soy {name}.",
    says_yes="Sí, soy {name}.",
    says_maker="Me creó {maker}.",
    says_made_me="Me creó {maker}.",
    says_character="Soy {character}.",
    says_fact="{my} {k} {is_} {v}.",
)  # fmt: skip
